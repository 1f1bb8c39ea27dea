"""Inputs of SwiGLU and GeGLU for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens size")
CASES = [
    _case("llama3_1b", "16384 8192"),
    _case("llama3_8b", "8192 14336"),
    _case("one_rank_of_eight", "65536 1792"),
]
SMALL = [_case("plain", "67 1001")]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Draw gate and up of normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.sizes["tokens"], case.sizes["size"])
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(device, dtype) for _ in range(2)
    ), {}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of two tensors read and one written, backward three and two; there are no matrix products."""
    rows = case.sizes["tokens"] * case.sizes["size"] * itemsize
    return Cost(0.0, float((5 if backward else 3) * rows))


SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, gradients=(0, 1))
