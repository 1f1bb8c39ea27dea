"""The GPU benchmark's judgement of the Triton kernels: they pass, and fail if they are slightly off."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.correctness import Check, deviations
from megatrain_kernels.kernel import KERNELS, sized

ATTENTION = KERNELS["attention"]
SHAPE = "batch q_seq k_seq heads kv_heads head_dim v_dim"
CHANGES: dict[str, dict[str, Any]] = {
    "right": {},
    "scale": {"scale": 1.02 * 64**-0.5},
    "one key more": {"q_offset": 1},
    "one key less": {"q_offset": -1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_attention(name: str) -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return ATTENTION.function(q, k, v, **{**options, **CHANGES[name]})

    changed.__name__ = "attention"
    kernel = dataclasses.replace(ATTENTION, function=changed)
    case = sized(SHAPE, "tiny", "1 37 37 2 1 64 64")
    check = Check(kernel, case, torch.bfloat16, "triton", lse=True)
    errors, facts = deviations(torch.device("cpu"), check)
    assert facts["same_bits"]
    wrong = {key for key, off in errors.items() if off > 1}
    assert len(errors) == 5
    assert wrong == (set() if name == "right" else set(errors))
