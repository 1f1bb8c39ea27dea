"""Inputs of the Newton-Schulz iteration for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

STEPS = 5
_case = partial(sized, "batch rows cols")
CASES = [
    _case("gpt2_124m", "12 768 3072"),
    _case("llama3_1b", "1 2048 8192"),
    _case("llama3_8b", "1 4096 14336"),
    _case("tall", "1 8192 2048"),
]
SMALL = [_case("wide", "2 67 190"), _case("tall", "1 190 67"), _case("square", "1 130 130")]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Draw matrices of normal numbers."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["batch"], n["rows"], n["cols"], generator=generator, device=device)
    return (x.to(device, dtype),), {"steps": STEPS}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the products and the bytes of x, which each iteration reads and writes; there is no backward pass.

    An iteration on a shorter side m and a longer side n takes half of 2m²n and of 2m³, whose results are symmetric, and
    2m²n.
    """
    n = case.sizes
    short, long = sorted((n["rows"], n["cols"]))
    flops = STEPS * n["batch"] * (3 * short**2 * long + short**3)
    return Cost(0.0 if backward else float(flops), float(2 * STEPS * n["batch"] * short * long * itemsize))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    dtypes=(torch.bfloat16,),
    slack=2.0,  # five iterations of three products, each rounded to bf16; 0.8 was seen
)
