"""Inputs of the router's gate for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens experts top_k")
CASES = [
    _case("mixtral", "16384 8 2"),
    _case("qwen3_30b", "16384 128 8"),
    _case("deepseek_v3", "16384 256 8", scores="sigmoid", scale=2.5, n_groups=8, top_groups=4),
]
"""Options are `moe_gate`'s."""
SMALL = [
    _case("softmax", "67 16 2"),
    _case("groups", "67 32 4", scores="sigmoid", n_groups=4, top_groups=2),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor], dict[str, Any]]:
    """Draw logits of normal numbers; there is no bias."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(case.sizes["tokens"], case.sizes["experts"], generator=generator, device=device)
    return (logits.to(device, dtype),), {"top_k": case.sizes["top_k"], **case.options}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of logits and scores (backward: scores and two gradients), and of each choice's index and weight.

    There are no matrix products.
    """
    n = case.sizes
    numbers = (3 if backward else 2) * n["experts"] + n["top_k"]
    return Cost(0.0, float(n["tokens"] * (numbers * itemsize + 8 * n["top_k"])))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    gradients=(0,),
    dtypes=(torch.float32,),
    timed_dtype=torch.float32,
)
