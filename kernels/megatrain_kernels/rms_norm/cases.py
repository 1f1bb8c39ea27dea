"""Inputs of RMSNorm that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost


def _case(name: str, tokens: int, size: int, *, residual: bool) -> Case:
    return Case(name, {"tokens": tokens, "size": size}, {"residual": residual})


CASES = [
    _case("llama3_1b", 32768, 2048, residual=False),
    _case("llama3_8b", 16384, 4096, residual=False),
    _case("llama3_8b_residual", 16384, 4096, residual=True),
    _case("llama3_70b_residual", 8192, 8192, residual=True),
    _case("heads", 1 << 20, 128, residual=False),
]
"""residual: the addition before the norm is a part of it."""
EPS = 1e-5


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """x, weight and eps, and the residual among the options, of normal numbers."""
    generator, sizes = torch.Generator(device).manual_seed(seed), case.sizes
    shape = (sizes["tokens"], sizes["size"])
    x, weight = (
        torch.randn(shape, generator=generator, device=device),
        torch.randn(shape[1], generator=generator, device=device),
    )
    options: dict[str, Any] = {"eps": EPS}
    if case.options["residual"]:
        options["residual"] = torch.randn(shape, generator=generator, device=device).to(device, dtype)
    return (x.to(device, dtype), weight.to(device, dtype)), options


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """No products. Rows that are read or written: forward x and out, and the residual and the sum with one; backward
    the gradient, x and x's gradient, and the gradient of the sum."""
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    times = (3 if backward else 2) + case.options["residual"] * (1 if backward else 2)
    return Cost(0.0, float(times * rows))
