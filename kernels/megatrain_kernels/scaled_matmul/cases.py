"""Inputs of scaled products that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost
from megatrain_kernels.quantization.op import quantize


def _case(name: str, sizes: str, **options: Any) -> Case:
    """sizes: "m k n"."""
    return Case(name, dict(zip(("m", "k", "n"), map(int, sizes.split()), strict=True)), options)


CASES = [
    _case("llama3_8b_up_by_tensor", "16384 4096 14336", a="tensor", b="tensor"),
    _case("llama3_8b_up_by_row", "16384 4096 14336", a="row", b="row"),
    _case("llama3_8b_up_by_block", "16384 4096 14336", a="group", b="block"),
    _case("llama3_8b_down_by_block", "16384 14336 4096", a="group", b="block"),
    _case("weight_gradient_by_group", "14336 16384 4096", a="group", b="group"),
    _case("few_tokens_by_block", "16 4096 14336", a="group", b="block"),
]
"""Options are the scalings of a and of the transpose of b."""


def make_inputs(case: Case, *, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, scale_a, scale_b of normal numbers in e4m3."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    a, b = (
        torch.randn(n[rows], n["k"], generator=generator, device=device).to(device) for rows in ("m", "n")
    )
    a, scale_a = quantize(a, dtype="e4m3", scaling=case.options["a"])
    b, scale_b = quantize(b, dtype="e4m3", scaling=case.options["b"])
    return a, b.mT, scale_a, scale_b.mT if scale_b.ndim == 2 else scale_b


def cost(case: Case, *, itemsize: int) -> Cost:
    """FLOPs of the product; operands of a byte a number cross memory once, and the result of `itemsize`."""
    m, k, n = (case.sizes[name] for name in ("m", "k", "n"))
    return Cost(2.0 * m * k * n, float(m * k + k * n + itemsize * m * n))
