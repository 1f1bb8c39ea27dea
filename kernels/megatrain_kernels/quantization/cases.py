"""Inputs of quantization that are tested, timed and planned with, and what a call costs at least."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost


def _case(name: str, rows: int, cols: int, **options: Any) -> Case:
    return Case(name, {"rows": rows, "cols": cols}, options)


CASES = [
    _case("activations_by_tensor", 16384, 4096, dtype="e4m3", scaling="tensor"),
    _case("activations_by_row", 16384, 4096, dtype="e4m3", scaling="row"),
    _case("activations_by_group", 16384, 4096, dtype="e4m3", scaling="group"),
    _case("gradients_by_group", 16384, 14336, dtype="e5m2", scaling="group"),
    _case("weights_by_block", 14336, 4096, dtype="e4m3", scaling="block"),
    _case("weights_int8", 14336, 4096, dtype="int8", scaling="row"),
    _case("weights_int4", 14336, 4096, dtype="int4", scaling="group", group_size=64),
]
"""Options are `quantize`'s."""


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor], dict[str, Any]]:
    """x of normal numbers in rows of unlike size, and the options of the call."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["rows"], n["cols"], generator=generator, device=device)
    x *= torch.randn(n["rows"], 1, generator=generator, device=device).exp()
    return (x.to(device, dtype),), dict(case.options)


def cost(case: Case, *, itemsize: int) -> Cost:
    """No products; the tensor and its codes cross memory once, twice where its largest number must be known first."""
    n, options = case.sizes["rows"] * case.sizes["cols"], case.options
    reads = 2 if options["scaling"] == "tensor" else 1
    return Cost(0.0, n * (reads * itemsize + (0.5 if options["dtype"] == "int4" else 1.0)))
