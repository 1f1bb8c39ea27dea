"""Inputs of the Newton-Schulz iteration that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost

STEPS = 5
CASES = [
    Case("gpt2_124m", {"batch": 12, "rows": 768, "cols": 3072}, {}),
    Case("llama3_1b", {"batch": 1, "rows": 2048, "cols": 8192}, {}),
    Case("llama3_8b", {"batch": 1, "rows": 4096, "cols": 14336}, {}),
    Case("tall", {"batch": 1, "rows": 8192, "cols": 2048}, {}),
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Matrices of normal numbers."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["batch"], n["rows"], n["cols"], generator=generator, device=device)
    return (x.to(device, dtype),), {"steps": STEPS}


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Of an iteration on a shorter side m and a longer side n: half of 2m²n and of 2m³, which are symmetric, and 2m²n.

    There is no backward pass. Bytes: each iteration reads and writes x.
    """
    n = case.sizes
    short, long = sorted((n["rows"], n["cols"]))
    flops = STEPS * n["batch"] * (3 * short**2 * long + short**3)
    return Cost(0.0 if backward else float(flops), float(2 * STEPS * n["batch"] * short * long * itemsize))
