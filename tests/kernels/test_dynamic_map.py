"""The 8-bit map of optimizer states: the published values' properties, and the nearest one by brute force."""

import pytest
import torch
from torch import Tensor

from megatrain_kernels.dynamic_map import BLOCK, TINY, ZERO_CODE, decode, dynamic_map, encode

CPU = torch.device("cpu")


def drawn(rows: int, columns: int, *, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of unlike size, in each row a few decades."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x *= 10.0 ** (-6 * torch.rand(rows, columns, generator=generator, dtype=dtype))
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_values_rise_from_end_to_end_and_have_zero_and_one(signed: bool) -> None:
    values = dynamic_map(signed, CPU)
    assert len(values) == 256
    assert (values.diff() > 0).all()
    assert values[ZERO_CODE[signed]] == 0
    assert values[-1] == 1
    # Of 256 codes 127 are left for negative numbers: -1 is none of them, as published.
    assert values[0] == (pytest.approx(-0.992969, abs=1e-6) if signed else 0)
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_each_decade_has_twice_as_many_values_as_the_one_below(signed: bool) -> None:
    values = dynamic_map(signed, CPU)
    decades = [int(((values >= 10.0**-n / 10) & (values < 10.0**-n)).sum()) for n in range(7)]
    assert decades == [(64 if signed else 128) >> n for n in range(7)]


@pytest.mark.parametrize("signed", [True, False])
def test_the_error_is_half_a_part_of_the_decade(signed: bool) -> None:
    """So 7 % at worst (signed) and 3.5 % of numbers above a tenth of the block's largest."""
    x = drawn(64, 256, signed=signed)
    codes, scales = encode(x, signed=signed)
    relative = x.abs() / scales.repeat_interleave(BLOCK, -1)
    error = (decode(codes, scales, x.dtype, signed=signed) - x).abs() / scales.repeat_interleave(BLOCK, -1)
    for decade in range(7):
        there = (relative <= 10.0**-decade) & (relative > 10.0**-decade / 10)
        parts = (64 if signed else 128) >> decade
        assert there.any()
        # Between decades, and below 1, the next value is the one of the wider parts.
        assert error[there].max() <= 0.45 * 10.0**-decade / parts * 1.5 + 1e-7, decade


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_values(signed: bool, dtype: torch.dtype) -> None:
    x = drawn(5, 300, signed=signed, dtype=dtype)
    codes, scales = encode(x, signed=signed)
    assert scales.shape == (5, 3)
    for row in range(5):
        for block in range(3):
            part = x[row, block * BLOCK : (block + 1) * BLOCK].double()
            largest = part.abs().max()
            assert scales[row, block] == largest
            far = (dynamic_map(signed, CPU).double()[None] - (part / largest)[:, None]).abs()
            chosen = far.gather(1, codes[row, block * BLOCK : (block + 1) * BLOCK].long()[:, None])[:, 0]
            if signed:
                torch.testing.assert_close(chosen, far.amin(1), rtol=0, atol=1e-7)
            else:  # nothing but 0 becomes 0
                torch.testing.assert_close(chosen, far[:, 1:].amin(1), rtol=0, atol=1e-7)


def test_second_moments_above_zero_stay_above_it() -> None:
    x = torch.full((1, BLOCK), 1e-12)
    x[0, 0], x[0, 1] = 1.0, 0.0
    codes, scales = encode(x, signed=False)
    assert codes[0, :3].tolist() == [255, 0, 1]
    assert decode(codes, scales, x.dtype, signed=False)[0, 2] > 1e-7


def test_blocks_of_nothing_and_of_no_numbers() -> None:
    x = torch.ones(4, BLOCK)
    x[0], x[1], x[2, 3] = 0.0, TINY / 2, torch.nan
    codes, scales = encode(x, signed=True)
    back = decode(codes, scales, x.dtype, signed=True)
    assert not back[:2].any()
    assert back[2].isnan().all()  # nothing hides an error
    assert torch.equal(back[3], x[3])
