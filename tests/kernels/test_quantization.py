"""Quantization by PyTorch against a search among the formats' numbers; bits are equal, so no tolerance is needed."""

from typing import Any

import numpy as np
import pytest
import torch
from quantization_check import MAX, SCALINGS, as_numbers, check, draw, nearest, numbers

from megatrain_kernels import dequantize, quantize
from megatrain_kernels.kernel import Case
from megatrain_kernels.quantization.cases import cost, make_inputs
from megatrain_kernels.quantization.op import dequantize_op, quantize_op

SHAPES = [(40, 70), (3, 33, 16), (1, 2), (2, 2, 5, 130)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", MAX)
def test_each_format_and_scaling(dtype: str, scaling: str) -> None:
    for seed, shape in enumerate(SHAPES):
        check(draw(*shape, seed=seed), dtype, scaling, "torch")


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_16_bits_and_odd_strides(given: torch.dtype) -> None:
    x = draw(66, 80, dtype=given)
    for view in (x.T, x[::3, ::2]):
        check(view, "e4m3", "block", "torch")
        check(view, "int4", "group", "torch")


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_every_number_of_a_format_is_kept_and_halves_go_to_even(dtype: str) -> None:
    grid = torch.from_numpy(numbers(dtype)).float()
    between = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([between.nextafter(torch.tensor(torch.inf)), between.nextafter(torch.tensor(0.0))])
    x = torch.cat([grid, between, near, torch.tensor([MAX[dtype]])])
    values, scale = quantize(torch.stack([x, -x]), dtype=dtype)
    assert scale == 1
    np.testing.assert_array_equal(as_numbers(values[0], dtype), nearest(x.numpy(), dtype))
    assert torch.equal(values[0].float(), -values[1].float())


def test_the_formats_are_those_of_torch() -> None:
    for dtype, torchs in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        codes = torch.arange(len(numbers(dtype)), dtype=torch.uint8).view(torchs)
        np.testing.assert_array_equal(codes.float().numpy(), numbers(dtype))
        assert torch.finfo(torchs).max == MAX[dtype]


@pytest.mark.parametrize("dtype", MAX)
def test_zeros_and_numbers_near_them(dtype: str) -> None:
    x = torch.zeros(3, 4)
    x[1] = 1e-40
    values, scales = quantize(x, dtype=dtype, scaling="row")
    assert (scales == 2.0**-126).all()
    back = dequantize(values, scales, dtype=dtype, scaling="row")
    assert not back[::2].any()
    # Below the least scale numbers lose bits, and never their order of size.
    assert (back[1] - 1e-40).abs().max() <= 2.0**-127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", MAX)
def test_what_is_not_finite_spoils_its_tile_and_no_other(dtype: str, bad: float) -> None:
    x = draw(4, 64)
    clean = quantize(x, dtype=dtype, scaling="group", group_size=32)
    x[2, 5] = bad
    values, scales = quantize(x, dtype=dtype, scaling="group", group_size=32)
    assert scales[2, 0].isnan()
    back = dequantize(values, scales, dtype=dtype, scaling="group", group_size=32)
    assert back[2, :32].isnan().all()
    before = dequantize(*clean, dtype=dtype, scaling="group", group_size=32)
    spared = torch.ones_like(x, dtype=torch.bool)
    spared[2, :32] = False
    assert torch.equal(back[spared], before[spared])


@pytest.mark.parametrize("dtype", MAX)
def test_errors_are_as_small_as_the_format_promises(dtype: str) -> None:
    """Half a unit in the last place, of a number up to the tile's largest; scale and quotient are rounded too."""
    x = draw(64, 128)
    values, scales = quantize(x, dtype=dtype, scaling="row")
    error = (dequantize(values, scales, dtype=dtype, scaling="row").double() - x.double()).abs()
    relative = {"e4m3": 2**-4, "e5m2": 2**-3}.get(dtype, 0.0)
    smallest = {"e4m3": 2**-10, "e5m2": 2**-17}.get(dtype, 0.5)
    bound = torch.maximum(relative * x.double().abs(), smallest * scales.double()) * (1 + 1e-5)
    assert (error <= bound).all()
    assert (error > 0.4 * bound).any()


def test_float64_becomes_float32_first() -> None:
    x = draw(8, 16, dtype=torch.float64)
    for got, expected in zip(quantize(x, dtype="e4m3"), quantize(x.float(), dtype="e4m3"), strict=True):
        assert torch.equal(got.float(), expected.float())


def test_nothing_to_quantize() -> None:
    for scaling in SCALINGS:
        values, scales = quantize(torch.empty(0, 16), dtype="e4m3", scaling=scaling)
        assert values.shape == (0, 16)
        assert dequantize(values, scales, dtype="e4m3", scaling=scaling).shape == (0, 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "e3m4"}, "must be e4m3, e5m2, int8, int4"),
        ({"dtype": "e4m3", "scaling": "column"}, "must be tensor, row, group, block"),
        ({"dtype": "e4m3", "backend": "cuda"}, "must be auto, reference, torch or triton"),
        ({"dtype": "e4m3", "backend": "triton"}, "needs a CUDA device"),
        ({"dtype": "int4"}, "last dimension must be even"),
        ({"dtype": "int8", "group_size": 0}, "1 or more"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize(torch.ones(2, 3), **options)


def test_scales_of_other_options_are_refused() -> None:
    values, scales = quantize(torch.ones(4, 256), dtype="e4m3", scaling="group")
    with pytest.raises(ValueError, match=r"must be float32 \(4, 1\)"):
        dequantize(values, scales, dtype="e4m3", scaling="row")
    with pytest.raises(ValueError, match=r"must be torch\.int8"):
        dequantize(values, scales, dtype="int8", scaling="group")


@pytest.mark.parametrize(
    ("dtype", "scaling"), [("e4m3", "tensor"), ("e5m2", "block"), ("int8", "row"), ("int4", "group")]
)
def test_operators_keep_their_contract(dtype: str, scaling: str) -> None:
    options = (dtype, scaling, 16)
    args = (draw(20, 34).T, *options, "torch")
    torch.library.opcheck(quantize_op, args)
    codes, scales = quantize_op(*args)
    torch.library.opcheck(dequantize_op, (codes, scales, *options, torch.bfloat16, "torch"))


def test_what_a_case_costs() -> None:
    case = Case("small", {"rows": 6, "cols": 8}, {"dtype": "int4", "scaling": "tensor"})
    (x,), options = make_inputs(case, dtype=torch.bfloat16, device="cpu")
    values, _ = quantize(x, **options)
    assert cost(case, itemsize=2).bytes == 2 * x.nbytes + values.nbytes
