"""Every operation on a CUDA device against float64: the correctness part of the GPU benchmark."""

import pytest
import torch

from benchmarks.gpu.correctness import steps
from benchmarks.gpu.steps import Setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = {step.name: step for step in steps(Setting(torch.device("cuda:0"), small=False))}


@pytest.mark.parametrize("name", STEPS)
def test_operation(name: str) -> None:
    for row in STEPS[name].run():
        assert row["off"] <= 1, f"{row['worst']} is off by {row['off']:.1f} tolerances"
        assert row["right"], "two calls differ in their bits"
