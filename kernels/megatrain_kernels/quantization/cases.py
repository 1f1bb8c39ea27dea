"""Inputs of quantization and its inverse for tests, benchmarks and plans, and what a call costs at least."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import Case, Cost, Suite, sized
from megatrain_kernels.quantization.reference import dequantize_reference, quantize_reference

_case = partial(sized, "rows cols")
CASES = [
    _case("activations_by_tensor", "16384 4096", dtype="e4m3", scaling="tensor"),
    _case("activations_by_row", "16384 4096", dtype="e4m3", scaling="row"),
    _case("activations_by_group", "16384 4096", dtype="e4m3", scaling="group"),
    _case("gradients_by_group", "16384 14336", dtype="e5m2", scaling="group"),
    _case("weights_by_block", "14336 4096", dtype="e4m3", scaling="block"),
    _case("weights_int8", "14336 4096", dtype="int8", scaling="row"),
    _case("weights_int4", "14336 4096", dtype="int4", scaling="group", group_size=64),
]
"""Options are `quantize`'s."""
SMALL = [
    _case(f"{dtype}_{scaling}", "131 270", dtype=dtype, scaling=scaling)
    for dtype, scaling in (
        ("e4m3", "tensor"),
        ("e4m3", "row"),
        ("e5m2", "group"),
        ("e4m3", "block"),
        ("int8", "row"),
        ("int4", "group"),
    )
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor], dict[str, Any]]:
    """Draw x of normal numbers in rows of unlike size."""
    n, generator = case.sizes, torch.Generator(device).manual_seed(seed)
    x = torch.randn(n["rows"], n["cols"], generator=generator, device=device)
    x *= torch.randn(n["rows"], 1, generator=generator, device=device).exp()
    return (x.to(device, dtype),), dict(case.options)


def dequantize_inputs(
    case: Case, *, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Draw x as `make_inputs` does, and quantize it."""
    (x,), options = make_inputs(case, dtype=dtype, device=device, seed=seed)
    size = options.get("group_size", 128)
    return quantize_reference(x, options["dtype"], options["scaling"], size), {**options, "out_dtype": dtype}


def _dequantized(values: Tensor, scales: Tensor, *, out_dtype: torch.dtype, **options: Any) -> Tensor:
    size = options.get("group_size", 128)
    return dequantize_reference(values, scales, options["dtype"], options["scaling"], size)


def cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of the tensor and its codes; the tensor is read twice where its largest number is needed first.

    There are no matrix products, and there is no backward pass.
    """
    if backward:
        return Cost(0.0, 0.0)
    n, options = case.sizes["rows"] * case.sizes["cols"], case.options
    reads = 2 if options["scaling"] == "tensor" else 1
    return Cost(0.0, n * (reads * itemsize + (0.5 if options["dtype"] == "int4" else 1.0)))


def dequantize_cost(case: Case, *, itemsize: int, backward: bool = False) -> Cost:
    """Count the bytes of the codes, which are read, and of the tensor, which is written."""
    n = case.sizes["rows"] * case.sizes["cols"]
    code = 0.5 if case.options["dtype"] == "int4" else 1.0
    return Cost(0.0, 0.0 if backward else n * (itemsize + code))


QUANTIZE_SUITE = Suite(cases=CASES, small=SMALL, make_inputs=make_inputs, cost=cost, dtypes=(torch.float32,))
DEQUANTIZE_SUITE = Suite(
    cases=CASES,
    small=SMALL,
    make_inputs=dequantize_inputs,
    cost=dequantize_cost,
    dtypes=(torch.float32, torch.bfloat16),
    truth=_dequantized,
)
