"""Quantization to 8 and 4 bits with a float32 scale for each tile, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatrain_kernels.quantization.formats import FORMATS, SMALLEST_SCALE, Tiles, scale_shape, tiles_of


def quantize_reference(x: Tensor, dtype: str, scaling: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Values and scales: scale = max|x| / largest code, value = x / scale to the nearest code, ties to even.

    The quotient is x times the scale's inverse, in float32, and saturates. See `op.quantize`.
    """
    tiles, form = tiles_of(x.shape, scaling, group_size), FORMATS[dtype]
    cut = _cut(x.float(), tiles)
    scales = tile_scales(cut.abs().amax((2, 4), keepdim=True), dtype)
    quotient = (cut * scales.reciprocal()).clamp(-form.largest, form.largest)
    quotient = quotient.where(scales.isfinite(), 0.0)
    codes = (quotient if form.mantissa else quotient.round()).to(
        torch.int8 if dtype == "int4" else form.dtype
    )
    values = _join(codes, tiles).reshape(x.shape)
    return pack(values) if dtype == "int4" else values, scales.reshape(
        scale_shape(x.shape, scaling, group_size)
    )


def tile_scales(largest: Tensor, dtype: str) -> Tensor:
    """Scales of tiles whose numbers reach up to `largest` in size (float32): NaN unless that is finite."""
    scales = (largest / FORMATS[dtype].largest).clamp(min=SMALLEST_SCALE)
    return scales.where(scales.isfinite(), torch.nan)


def dequantize_reference(values: Tensor, scales: Tensor, dtype: str, scaling: str, group_size: int) -> Tensor:
    """value · scale in float32."""
    numbers = (unpack(values) if dtype == "int4" else values).float()
    tiles = tiles_of(numbers.shape, scaling, group_size)
    batch, rows, cols = tiles.grid
    product = _cut(numbers, tiles) * scales.reshape(batch, rows, 1, cols, 1)
    return _join(product, tiles).reshape(numbers.shape)


def pack(codes: Tensor) -> Tensor:
    """int4 codes (int8, last dimension even) two a byte: the first of each pair in the low half."""
    return ((codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)).view(torch.uint8)


def unpack(values: Tensor) -> Tensor:
    """The inverse of `pack`."""
    halves = torch.stack([values & 15, values >> 4], -1).flatten(-2).view(torch.int8)
    return (halves ^ 8) - 8


def _cut(x: Tensor, tiles: Tiles) -> Tensor:
    """x as `(batch, tiles down, tile_rows, tiles across, tile_cols)`, filled up with zeros."""
    batch, down, across = tiles.grid
    spare = (across * tiles.tile_cols - tiles.cols, down * tiles.tile_rows - tiles.rows)
    whole = x.reshape(batch, tiles.rows, tiles.cols)
    if any(spare):
        whole = pad(whole, (0, spare[0], 0, spare[1]))
    return whole.view(batch, down, tiles.tile_rows, across, tiles.tile_cols)


def _join(cut: Tensor, tiles: Tiles) -> Tensor:
    """The inverse of `_cut`: `(batch, rows, cols)`."""
    return cut.flatten(3, 4).flatten(1, 2)[:, : tiles.rows, : tiles.cols]
