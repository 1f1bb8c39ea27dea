"""Inputs of rotary position embeddings for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "batch seq heads kv_heads head_dim")
CASES = [
    _case("llama3_1b", "8 4096 32 8 64"),
    _case("llama3_8b", "2 8192 32 8 128"),
    _case("llama3_70b_one_rank_of_eight", "1 8192 8 1 128"),
]
SMALL = [_case("grouped", "2 67 6 2 64"), _case("head_96", "1 67 3 1 96")]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Draw q and k of normal numbers, and make tables of angles up to one radian a position."""
    generator, n = torch.Generator(device).manual_seed(seed), case.sizes
    shapes = ((n["batch"], n["seq"], n[heads], n["head_dim"]) for heads in ("heads", "kv_heads"))
    q, k = (torch.randn(shape, generator=generator, device=device).to(device, dtype) for shape in shapes)
    half = n["head_dim"] // 2
    angles = torch.outer(torch.arange(n["seq"]), 10_000.0 ** (-torch.arange(half) / half))
    return (q, k, angles.cos().to(device), angles.sin().to(device)), {}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count bytes: q and k are read and written, the tables (float32) are read once. There are no matrix products."""
    n = case.sizes
    elements = n["batch"] * n["seq"] * (n["heads"] + n["kv_heads"]) * n["head_dim"]
    return Cost(0.0, float(2 * elements * itemsize + 4 * n["seq"] * n["head_dim"]))


SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, gradients=(0, 1))
