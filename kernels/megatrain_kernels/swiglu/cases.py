"""Inputs of SwiGLU (and of GeGLU) that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost

CASES = [
    Case("llama3_1b", {"tokens": 16384, "size": 8192}, {}),
    Case("llama3_8b", {"tokens": 8192, "size": 14336}, {}),
    Case("one_rank_of_eight", {"tokens": 65536, "size": 1792}, {}),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """gate and up of normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.sizes["tokens"], case.sizes["size"])
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(device, dtype) for _ in range(2)
    ), {}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """No products. Forward two tensors are read and one written; backward three and two."""
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    return Cost(0.0, float((5 if backward else 3) * rows))
