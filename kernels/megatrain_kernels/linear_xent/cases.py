"""Inputs of linear layer and cross entropy for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized

_case = partial(sized, "tokens hidden vocab")
CASES = [
    _case("gpt2_124m", "16384 768 50257"),
    _case("llama3_1b", "16384 2048 128256"),
    _case("llama3_8b", "8192 4096 128256"),
    _case("llama3_8b_z_loss", "8192 4096 128256", z_loss=1e-4),
    _case("gemma2_9b", "8192 3584 256000", softcap=30.0),
    _case("one_rank_of_eight", "32768 8192 16032"),
]
"""Options are `linear_cross_entropy`'s."""
SMALL = [
    _case("plain", "130 96 5003"),
    _case("z_loss", "67 96 1031", z_loss=1e-2),
    _case("softcap", "67 96 1031", softcap=3.0),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Draw x of normal numbers, a weight that makes logits of size 1, and even targets."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["tokens"], n["hidden"], generator=generator, device=device)
    weight = torch.randn(n["vocab"], n["hidden"], generator=generator, device=device) * n["hidden"] ** -0.5
    targets = torch.randint(n["vocab"], (n["tokens"],), generator=generator, device=device)
    return (x.to(device, dtype), weight.to(device, dtype), targets.to(device)), dict(case.options)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count one product forward and two backward; x, weight and targets are read once, and both gradients written."""
    n = case.sizes
    flops = 2.0 * n["tokens"] * n["hidden"] * n["vocab"] * (2 if backward else 1)
    numbers = (n["tokens"] + n["vocab"]) * n["hidden"] * itemsize
    return Cost(flops, float(numbers + (0 if backward else 8 * n["tokens"])))


SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=make_inputs,
    cost=cost,
    gradients=(0, 1),
    timed_backends=("auto", "triton"),
)
