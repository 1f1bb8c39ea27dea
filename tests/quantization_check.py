"""The number formats written out from their definition, and quantization by search among their numbers."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain_kernels import dequantize, quantize

MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
SCALINGS = {"tensor": 128, "row": 128, "group": 16, "block": 32}
"""With the sizes of groups and blocks that are tested."""
TINY = 2.0**-126


@cache
def numbers(dtype: str) -> np.ndarray:
    """All that are not negative, rising (float64); of fp8, the i-th has the code i (arXiv 2209.05433, table 1)."""
    if dtype.startswith("int"):
        return np.arange(int(MAX[dtype]) + 1, dtype=np.float64)
    mantissa, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[dtype]
    found: list[float] = []
    code = 0
    while not found or found[-1] < MAX[dtype]:
        exponent, fraction = divmod(code, 2**mantissa)
        found.append(math.ldexp(fraction / 2**mantissa + (exponent > 0), max(exponent, 1) - bias))
        code += 1
    return np.array(found)


def nearest(y: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest number of the format, saturating; of two, the one with the even code."""
    grid, size = numbers(dtype), np.abs(y).astype(np.float64)
    above = np.searchsorted(grid, size).clip(1, len(grid) - 1)
    low, high = size - grid[above - 1], grid[above] - size
    upper = (high < low) | ((high == low) & (above % 2 == 0))
    return np.copysign(np.where(upper, grid[above], grid[above - 1]), y)


def tiles(shape: tuple[int, ...], scaling: str, size: int) -> np.ndarray:
    """The number of each element's tile, counted in the order of the scales."""
    if scaling == "tensor":
        return np.zeros(shape, dtype=np.int64)
    rows, cols = np.indices((math.prod(shape[:-1]), shape[-1]))
    if scaling == "row":
        return rows.reshape(shape)
    across = -(-shape[-1] // size)
    if scaling == "group":
        return (rows * across + cols // size).reshape(shape)
    down = -(-shape[-2] // size)
    return ((rows // shape[-2] * down + rows % shape[-2] // size) * across + cols // size).reshape(shape)


def by_search(x: Tensor, dtype: str, scaling: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (float64, of x's shape) and scales (float32, flat) that `quantize` must give for finite x."""
    values, place = x.float().numpy(), tiles(tuple(x.shape), scaling, size)
    top = np.zeros(int(place.max()) + 1, dtype=np.float32)
    np.maximum.at(top, place, np.abs(values))
    scales = np.maximum(top / np.float32(MAX[dtype]), np.float32(TINY))
    return nearest(values * (np.float32(1) / scales)[place], dtype), scales


def as_numbers(values: Tensor, dtype: str) -> np.ndarray:
    """What stored values are (float64), by the definition of the codes."""
    codes = values.contiguous().view(torch.uint8).numpy().astype(np.int64)
    if dtype == "int8":
        return np.where(codes > 127, codes - 256, codes).astype(np.float64)
    if dtype == "int4":
        pairs = np.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:-1], -1)
        return np.where(pairs > 7, pairs - 16, pairs).astype(np.float64)
    assert ((codes & 127) < len(numbers(dtype))).all(), "codes of NaN or infinity"
    return np.where(codes > 127, -1.0, 1.0) * numbers(dtype)[codes & 127]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of sizes from 1e-3 to 1e3, with a number here and there that is far smaller than its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64).mul(2).exp()
    small = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.2
    return torch.where(small, x * 1e-3, x).to(dtype)


def check(x: Tensor, dtype: str, scaling: str, backend: str) -> None:
    """Values, scales, and what comes back, bit by bit."""
    size = SCALINGS[scaling]
    options: dict[str, Any] = {"dtype": dtype, "scaling": scaling, "group_size": size, "backend": backend}
    values, scales = quantize(x, **options)
    expected, true_scales = by_search(x, dtype, scaling, size)
    assert scales.dtype == torch.float32
    np.testing.assert_array_equal(scales.flatten().numpy(), true_scales)
    np.testing.assert_array_equal(as_numbers(values, dtype), expected)
    back = dequantize(values, scales, **options)
    product = expected.astype(np.float32) * true_scales[tiles(tuple(x.shape), scaling, size)]
    np.testing.assert_array_equal(back.numpy(), product)
