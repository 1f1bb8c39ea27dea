"""Inputs of LayerNorm that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost

CASES = [
    Case("gpt2_124m", {"tokens": 65536, "size": 768}, {}),
    Case("gpt2_1_5b", {"tokens": 16384, "size": 1600}, {}),
    Case("wide", {"tokens": 8192, "size": 8192}, {}),
]
EPS = 1e-5


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """x, weight and bias of normal numbers, and eps among the options."""
    generator, sizes = torch.Generator(device).manual_seed(seed), case.sizes
    shapes = ((sizes["tokens"], sizes["size"]), (sizes["size"],), (sizes["size"],))
    tensors = (torch.randn(shape, generator=generator, device=device).to(device, dtype) for shape in shapes)
    return tuple(tensors), {"eps": EPS}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """No products. Forward x is read and out written; backward the gradient and x are read and x's gradient written."""
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    return Cost(0.0, float((3 if backward else 2) * rows))
