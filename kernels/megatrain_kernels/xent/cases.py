"""Inputs of cross entropy for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens vocab")
CASES = [
    _case("gpt2", "16384 50257"),
    _case("llama3", "8192 128256"),
    _case("llama3_z_loss", "8192 128256", z_loss=1e-4),
    _case("gemma2", "4096 256000", softcap=30.0),
    _case("one_rank_of_eight", "32768 16032"),
    _case("small_vocabulary", "65536 2048"),
]
"""Options are `cross_entropy`'s."""
SMALL = [
    _case("plain", "67 5003"),
    _case("z_loss", "67 1031", z_loss=1e-2),
    _case("softcap", "67 1031", softcap=3.0),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Draw logits of normal numbers and even targets."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n["tokens"], n["vocab"], generator=generator, device=device)
    targets = torch.randint(n["vocab"], (n["tokens"],), generator=generator, device=device)
    return (logits.to(device, dtype), targets.to(device)), dict(case.options)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of logits read, of gradients written backward, and 12 a row of targets and losses.

    There are no matrix products.
    """
    n = case.sizes
    return Cost(0.0, float(n["tokens"] * n["vocab"] * itemsize + (0 if backward else 12 * n["tokens"])))


SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, gradients=(0,))
