"""Inputs of the gate that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost


def _case(name: str, sizes: str, **options: Any) -> Case:
    """sizes: "tokens experts top_k"."""
    return Case(
        name, dict(zip(("tokens", "experts", "top_k"), map(int, sizes.split()), strict=True)), options
    )


CASES = [
    _case("mixtral", "16384 8 2"),
    _case("qwen3_30b", "16384 128 8"),
    _case("deepseek_v3", "16384 256 8", scores="sigmoid", scale=2.5, n_groups=8, top_groups=4),
]
"""Options are `moe_gate`'s."""


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, None], dict[str, Any]]:
    """Logits of normal numbers, no bias, and the options of the call."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(case.sizes["tokens"], case.sizes["experts"], generator=generator, device=device)
    return (logits.to(device, dtype), None), {"top_k": case.sizes["top_k"], **case.options}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """No products. Logits and scores (backward: scores and two gradients), and an index and a weight of each choice."""
    n = case.sizes
    numbers = (3 if backward else 2) * n["experts"] + n["top_k"]
    return Cost(0.0, float(n["tokens"] * (numbers * itemsize + 8 * n["top_k"])))
