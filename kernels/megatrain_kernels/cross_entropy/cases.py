"""Inputs of cross entropy that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost


def _case(name: str, sizes: str, **options: Any) -> Case:
    """sizes: "tokens vocab"."""
    return Case(name, dict(zip(("tokens", "vocab"), map(int, sizes.split()), strict=True)), options)


CASES = [
    _case("gpt2", "16384 50257"),
    _case("llama3", "8192 128256"),
    _case("llama3_z_loss", "8192 128256", z_loss=1e-4),
    _case("gemma2", "4096 256000", softcap=30.0),
    _case("one_rank_of_eight", "32768 16032"),
    _case("small_vocabulary", "65536 2048"),
]
"""Options are `cross_entropy`'s."""


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Logits of normal numbers, targets drawn evenly, and the options of the call."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n["tokens"], n["vocab"], generator=generator, device=device)
    targets = torch.randint(n["vocab"], (n["tokens"],), generator=generator, device=device)
    return (logits.to(device, dtype), targets.to(device)), dict(case.options)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """No products. Forward, logits are read; backward, gradients are written; targets and losses are 12 bytes a row."""
    n = case.sizes
    return Cost(0.0, float(n["tokens"] * n["vocab"] * itemsize + (0 if backward else 12 * n["tokens"])))
