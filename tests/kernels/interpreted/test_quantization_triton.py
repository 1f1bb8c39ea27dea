"""The Triton kernels of quantization against a search among the formats' numbers, bit by bit.

The kernels make codes from the numbers' bits and cast nothing to fp8, so what the interpreter gets wrong (its casts
truncate) is not used.
"""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_check import MAX, SCALINGS, as_numbers, check, draw, nearest, numbers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain_kernels import dequantize, quantize
from megatrain_kernels.quantization.op import dequantize_op, quantize_op

SHAPES = [(40, 70), (3, 33, 16), (1, 2)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", MAX)
def test_each_format_and_scaling(dtype: str, scaling: str) -> None:
    for seed, shape in enumerate(SHAPES):
        check(draw(*shape, seed=seed), dtype, scaling, "triton")


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 70),
    size=st.integers(1, 100),
    dtype=st.sampled_from(sorted(MAX)),
    scaling=st.sampled_from(sorted(SCALINGS)),
)
def test_any(seed: int, rows: int, size: int, dtype: str, scaling: str) -> None:
    """Int4 holds two numbers a byte, so its rows have an even length."""
    check(draw(rows, 2 * size if dtype == "int4" else size, seed=seed), dtype, scaling, "triton")


def test_rows_longer_than_a_program_takes_at_a_time() -> None:
    for scaling in ("row", "tensor"):
        check(draw(5, 2500), "e4m3", scaling, "triton")
        check(draw(5, 2500), "int4", scaling, "triton")


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_16_bits_and_odd_strides(given: torch.dtype) -> None:
    x = draw(66, 80, dtype=given)
    for view in (x.T, x[::3, ::2]):
        check(view, "e4m3", "block", "triton")
        check(view, "int4", "group", "triton")
        check(view, "e5m2", "tensor", "triton")


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_every_number_of_a_format_is_kept_and_halves_go_to_even(dtype: str) -> None:
    grid = torch.from_numpy(numbers(dtype)).float()
    between = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([between.nextafter(torch.tensor(torch.inf)), between.nextafter(torch.tensor(0.0))])
    x = torch.cat([grid, between, near, torch.tensor([MAX[dtype]])])
    values, _ = quantize(torch.stack([x, -x]), dtype=dtype, backend="triton")
    np.testing.assert_array_equal(as_numbers(values[0], dtype), nearest(x.numpy(), dtype))
    np.testing.assert_array_equal(as_numbers(values[1], dtype), -nearest(x.numpy(), dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the numbers that spoil a tile
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_finite_spoils_its_tile_as_in_pytorch(scaling: str, bad: float) -> None:
    x = draw(40, 64)
    x[35, 5] = bad
    options: dict[str, Any] = {"dtype": "e4m3", "scaling": scaling, "group_size": 16}
    values, scales = quantize(x, backend="triton", **options)
    for got, expected in zip((values, scales), quantize(x, backend="torch", **options), strict=True):
        np.testing.assert_array_equal(got.float().numpy(), expected.float().numpy())
    back = dequantize(values, scales, backend="triton", **options)
    assert back.isnan().sum() == {"tensor": 40 * 64, "row": 64, "group": 16, "block": 8 * 16}[scaling]


def truncating(y: Any, MANTISSA: int, BIAS: int) -> Any:
    """What the interpreter's own cast does to normal numbers."""
    bits = y.to(tl.int32, bitcast=True)
    code = ((bits & 0x7FFFFFFF) >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    return tl.maximum(code, 0) | ((bits >> 24) & 0x80)


def test_a_cast_that_truncates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("megatrain_kernels.quantization.triton"), "encode", truncating)
    with pytest.raises(AssertionError):
        check(draw(40, 70), "e4m3", "row", "triton")


def _shorter(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (grid[0] - 1, *grid[1:])


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_a_program_too_few_is_noticed(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = import_module("megatrain_kernels.quantization.triton")
    kernel = launcher.quantize_kernel

    class Fewer:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return kernel[_shorter(grid)]

    monkeypatch.setattr(launcher, "quantize_kernel", Fewer())
    with pytest.raises(AssertionError):
        check(draw(400, 70), "e4m3", scaling, "triton")


class Operators(TorchDispatchMode):
    """Notes the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operation.is_view and not operation.name().startswith(("aten::empty", "aten::_unsafe_view")):
            self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


def test_one_launch_a_call_and_one_more_for_the_largest_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, launches, x = import_module("megatrain_kernels.quantization.triton"), list[Any](), draw(40, 64)

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: launches.append(grid)

    monkeypatch.setattr(launcher, "quantize_kernel", Counted())
    for scaling in SCALINGS:
        with Operators() as seen:
            launcher.quantize(x, "e4m3", scaling, 16)
        assert seen.names == ["aten::linalg_vector_norm"] * (scaling == "tensor")
    assert len(launches) == len(SCALINGS)


@pytest.mark.parametrize(("dtype", "scaling"), [("e4m3", "tensor"), ("e5m2", "block"), ("int4", "group")])
def test_operators_keep_their_contract(dtype: str, scaling: str) -> None:
    x: Tensor = draw(20, 34).T
    options = (dtype, scaling, 16)
    args = (x, *options, "triton")
    torch.library.opcheck(quantize_op, args)
    codes, scales = quantize_op(*args)
    torch.library.opcheck(dequantize_op, (codes, scales, *options, torch.float32, "triton"))
