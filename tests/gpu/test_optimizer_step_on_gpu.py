"""The update on a GPU: its states are the CPU's, but for roundings of float32 that move one over an edge."""

from typing import Any

import pytest
import torch

from megatrain_kernels import optimizer_step
from megatrain_kernels.optimizer.cases import CASES, SMALL, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 3
MOVED = 1e-3
"""Share of states that rounding may move to the next code or the next bf16 number; 1e-5 is expected."""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_states_are_those_of_a_cpu(case: Any) -> None:
    tensors, options = make_inputs(case, dtype=torch.bfloat16, device="cpu")
    on_gpu = [t.cuda() for t in tensors]
    clip = options.pop("clip")
    for _ in range(STEPS):
        gradients = [t.clone() for t in tensors]  # PyTorch's path scales them in place
        optimizer_step(*tensors, **options, clip=clip, backend="torch")
        optimizer_step(*on_gpu, **options, clip=None if clip is None else clip.cuda(), backend="triton")
        names = [name for name in options["how"].fields for _ in range(case.sizes["parameters"])]
        for name, tensor, before, there in zip(names, tensors, gradients, on_gpu, strict=True):
            if name == "gradient":
                tensor.copy_(before)
                there.copy_(before)
    for name, mine, other in zip(names, on_gpu, tensors, strict=True):
        mine, other = mine.cpu().double(), other.double()
        if name in options["how"].moments and options["how"].states != "full":
            assert (mine != other).double().mean() <= MOVED, name
            torch.testing.assert_close(
                mine, other, rtol=2.0**-7, atol=1.0 if options["how"].states == "int8" else 0
            )
        elif name != "gradient":
            bound = 2.0**-7 if name == "copy" else 1e-4
            torch.testing.assert_close(mine, other, rtol=bound, atol=bound)


def test_the_host_does_not_wait() -> None:
    case = next(case for case in CASES if case.name == "many_small")
    tensors, options = make_inputs(case, dtype=torch.bfloat16, device="cuda")
    optimizer_step(*tensors, **options, backend="triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(*tensors, **options, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
