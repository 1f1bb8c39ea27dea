"""Inputs of grouped products for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens groups in_size out_size")
CASES = [
    _case("mixtral_up", "16384 8 4096 14336"),
    _case("mixtral_down", "16384 8 14336 4096"),
    _case("deepseek_v3_up", "65536 256 7168 2048"),
    _case("deepseek_v3_up_one_rank", "16384 4 7168 2048"),
    _case("skewed", "16384 64 2048 1408", skew=1.5),
    _case("few_tokens", "256 128 2048 768"),
]
"""`skew` s: expert i has a share proportional to (i + 1) to the power -s; 0: shares drawn evenly."""
SMALL = [
    _case("even", "300 5 136 72"),
    _case("skewed", "300 17 72 136", skew=2.0),
    _case("odd_rows", "99 4 67 45"),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Draw x and weights of normal numbers, and group sizes token by token."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["tokens"], n["in_size"], generator=generator, device=device)
    weights = torch.randn(n["groups"], n["out_size"], n["in_size"], generator=generator, device=device)
    shares = torch.arange(1, n["groups"] + 1, dtype=torch.float64, device=device) ** -float(
        case.options.get("skew", 0)
    )
    drawn = torch.multinomial(shares, n["tokens"], replacement=True, generator=generator)
    sizes = torch.bincount(drawn, minlength=n["groups"])
    return (x.to(device, dtype), weights.to(device, dtype), sizes.to(device)), {}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count one product forward and two backward; each tensor crosses memory once, backward gradients too."""
    n = case.sizes
    flops = 2.0 * n["tokens"] * n["in_size"] * n["out_size"] * (2 if backward else 1)
    given = n["tokens"] * n["in_size"] + n["groups"] * n["in_size"] * n["out_size"]
    made = n["tokens"] * n["out_size"]
    return Cost(flops, float(itemsize * ((2 * given + made) if backward else given + made)))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    gradients=(0, 1),
    timed_backends=("auto", "triton"),
)
