"""Inputs of GELU with a bias for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens size")
CASES = [
    _case("gpt2_124m", "16384 3072", tanh=True),
    _case("gpt2_1_5b", "16384 6400", tanh=True),
    _case("vit_large", "32768 4096", tanh=False),
]
"""Options are `bias_gelu`'s."""
SMALL = [_case("tanh", "67 1001", tanh=True), _case("exact", "67 1001", tanh=False)]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Draw x and bias of normal numbers."""
    generator, sizes = torch.Generator(device).manual_seed(seed), case.sizes
    shapes = ((sizes["tokens"], sizes["size"]), (sizes["size"],))
    x, bias = (torch.randn(shape, generator=generator, device=device).to(device, dtype) for shape in shapes)
    return (x, bias), dict(case.options)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of one tensor read and one written, backward two and one; there are no matrix products."""
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    vector = case.sizes["size"] * itemsize
    return Cost(0.0, float(3 * rows + 2 * vector if backward else 2 * rows + vector))


SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, gradients=(0, 1))
