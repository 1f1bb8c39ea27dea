"""Inputs of scaled products for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized
from megatrain_kernels.quantization.op import quantize

_case = partial(sized, "m k n")
CASES = [
    _case("llama3_8b_up_by_tensor", "16384 4096 14336", a="tensor", b="tensor"),
    _case("llama3_8b_up_by_row", "16384 4096 14336", a="row", b="row"),
    _case("llama3_8b_up_by_block", "16384 4096 14336", a="group", b="block"),
    _case("llama3_8b_down_by_block", "16384 14336 4096", a="group", b="block"),
    _case("weight_gradient_by_group", "14336 16384 4096", a="group", b="group"),
    _case("few_tokens_by_block", "16 4096 14336", a="group", b="block"),
]
"""Options are the scalings of a and of the transpose of b."""
SMALL = [
    _case("by_tensor", "80 272 144", a="tensor", b="tensor"),
    _case("by_row", "80 272 144", a="row", b="row"),
    _case("by_block", "67 300 150", a="group", b="block"),
    _case("by_group", "67 300 150", a="group", b="group"),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """Draw a and b of normal numbers in e4m3, with their scales; `dtype` is the result's."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    a, b = (
        torch.randn(n[rows], n["k"], generator=generator, device=device).to(device) for rows in ("m", "n")
    )
    a, scale_a = quantize(a, dtype="e4m3", scaling=case.options["a"])
    b, scale_b = quantize(b, dtype="e4m3", scaling=case.options["b"])
    scale_b = scale_b.mT if scale_b.ndim == 2 else scale_b
    return (a, b.mT, scale_a, scale_b), {"out_dtype": dtype}


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **_: Any) -> Tensor:
    """Multiply in float64, each value times the scale of its tile (1, groups of 128, or the whole row or column)."""

    def spread(scale: Tensor, shape: torch.Size) -> Tensor:
        for dim in range(scale.ndim):
            times = {1: shape[dim], shape[dim]: 1}.get(scale.shape[dim], 128)
            scale = scale.repeat_interleave(times, dim).narrow(dim, 0, shape[dim])
        return scale.double()

    return (a.double() * spread(scale_a, a.shape)) @ (b.double() * spread(scale_b, b.shape))


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the product; operands of a byte a number cross memory once, and the result of `itemsize`.

    There is no backward pass.
    """
    m, k, n = (case.sizes[name] for name in ("m", "k", "n"))
    return Cost(0.0, 0.0) if backward else Cost(2.0 * m * k * n, float(m * k + k * n + itemsize * m * n))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    dtypes=(torch.bfloat16,),
    timed_backends=("auto", "triton"),
    ceiling="fp8",
    truth=_product,
)
