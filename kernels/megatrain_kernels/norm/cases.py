"""Inputs of RMSNorm and LayerNorm for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens size")
EPS = 1e-5
RMS_NORM_CASES = [
    _case("llama3_1b", "32768 2048", residual=False),
    _case("llama3_8b", "16384 4096", residual=False),
    _case("llama3_8b_residual", "16384 4096", residual=True),
    _case("llama3_70b_residual", "8192 8192", residual=True),
    _case("heads", f"{1 << 20} 128", residual=False),
]
"""residual: the addition before the norm is a part of it."""
RMS_NORM_SMALL = [_case("plain", "67 1000", residual=False), _case("residual", "67 1000", residual=True)]
LAYER_NORM_CASES = [
    _case("gpt2_124m", "65536 768", residual=False),
    _case("gpt2_124m_residual", "65536 768", residual=True),
    _case("gpt2_1_5b", "16384 1600", residual=False),
    _case("gpt2_1_5b_residual", "16384 1600", residual=True),
    _case("wide", "8192 8192", residual=False),
]
LAYER_NORM_SMALL = [
    _case("plain", "67 1000", residual=False),
    _case("one_row", "1 33", residual=False),
    _case("residual", "67 1000", residual=True),
]


def rms_norm_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw x, weight and, if the case has one, residual of normal numbers."""
    return _inputs(case, 1, dtype, device, seed)


def layer_norm_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw x, weight, bias and, if the case has one, residual of normal numbers."""
    return _inputs(case, 2, dtype, device, seed)


def _inputs(
    case: Case, vectors: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw the arguments of a norm with as many `vectors` of parameters."""
    generator, sizes = torch.Generator(device).manual_seed(seed), case.sizes
    rows, vector = (sizes["tokens"], sizes["size"]), (sizes["size"],)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(device, dtype)

    given = [normal(shape) for shape in (rows, *[vector] * vectors)]
    return (*given, EPS, *([normal(rows)] if case.options["residual"] else [])), {}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of rows that are read or written; there are no matrix products.

    Forward these are x and the result, and with a residual that and the sum; backward the gradient, x and x's gradient,
    and with a residual the gradient of the sum.
    """
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    times = (3 if backward else 2) + case.options["residual"] * (1 if backward else 2)
    return Cost(0.0, float(times * rows))


RMS_NORM_SUITE = Suite(
    cases=RMS_NORM_CASES, small=RMS_NORM_SMALL, make_inputs=rms_norm_inputs, cost=cost, gradients=(0, 1, 3)
)
LAYER_NORM_SUITE = Suite(
    cases=LAYER_NORM_CASES,
    small=LAYER_NORM_SMALL,
    make_inputs=layer_norm_inputs,
    cost=cost,
    gradients=(0, 1, 2, 4),
)
