"""Number formats of 8 and 4 bits, the tiles of a tensor that share a scale, and quantization written out."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Format(NamedTuple):
    """Numbers that a code can stand for; the largest in size takes a tile's largest number."""

    dtype: torch.dtype
    """Type of the stored values; two int4 make one byte."""
    largest: float
    mantissa: int = 0
    """Bits of the mantissa; 0: whole numbers."""
    bias: int = 0
    """Bias of the exponent."""


FORMATS = {
    "e4m3": Format(torch.float8_e4m3fn, 448.0, 3, 7),
    "e5m2": Format(torch.float8_e5m2, 57344.0, 2, 15),
    "int8": Format(torch.int8, 127.0),
    "int4": Format(torch.uint8, 7.0),
}
"""fp8: arXiv 2209.05433, table 1 (e4m3 has no infinity). The whole numbers are symmetric: -128 and -8 are not used."""

SCALINGS = ("tensor", "row", "group", "block")
SMALLEST_SCALE = 2.0**-126
"""The least normal float32, so that a scale and its inverse are exact on devices that drop smaller ones."""


class Tiles(NamedTuple):
    """A tensor seen as `(batch, rows, cols)`, of which each `tile_rows` by `tile_cols` share a scale."""

    batch: int
    rows: int
    cols: int
    tile_rows: int
    tile_cols: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Numbers of tiles along batch, rows and columns."""
        return self.batch, -(-self.rows // self.tile_rows), -(-self.cols // self.tile_cols)


def tiles_of(shape: torch.Size, scaling: str, group_size: int) -> Tiles:
    """Return how `scaling` divides a tensor of that shape into tiles; all of it is one row under "tensor".

    Raises:
        ValueError: there is no scaling of that name, or the tensor has no rows for it.
    """
    if scaling not in SCALINGS or group_size < 1:
        raise ValueError(
            f"scaling={scaling!r}, group_size={group_size}: must be {', '.join(SCALINGS)}, and 1 or more"
        )
    if len(shape) < (2 if scaling == "block" else 1):
        raise ValueError(f"scaling={scaling!r} needs a matrix or more; got the shape {tuple(shape)}")
    cols, rows = shape[-1], shape[:-1].numel()
    if scaling == "tensor":
        return Tiles(1, 1, shape.numel(), 1, max(1, shape.numel()))
    if scaling == "block":
        return Tiles(shape[:-2].numel(), shape[-2], cols, group_size, group_size)
    return Tiles(1, rows, cols, 1, max(1, cols) if scaling == "row" else group_size)


def scale_shape(shape: torch.Size, scaling: str, group_size: int) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of `shape`: one a tile, in as many dimensions ("tensor": none)."""
    if scaling == "tensor":
        return ()
    _, rows, cols = tiles_of(shape, scaling, group_size).grid
    return (*shape[:-2], rows, cols) if scaling == "block" else (*shape[:-1], cols)


def unpacked_shape(values: Tensor, dtype: str) -> torch.Size:
    """Return the shape of the numbers that `values` holds."""
    doubled = 2 if dtype == "int4" else 1
    return torch.Size((*values.shape[:-1], values.shape[-1] * doubled))


def quantize_reference(x: Tensor, dtype: str, scaling: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Return values and scales: scale = max|x| / largest code, value = x / scale to the nearest code, ties to even.

    The quotient is x times the scale's inverse, in float32, and saturates. See `op.quantize`.
    """
    tiles, form = tiles_of(x.shape, scaling, group_size), FORMATS[dtype]
    tiled = _tile(x.float(), tiles)
    scales = tile_scales(tiled.abs().amax((2, 4), keepdim=True), dtype)
    quotient = (tiled * scales.reciprocal()).clamp(-form.largest, form.largest)
    quotient = quotient.where(scales.isfinite(), 0.0)
    codes = (quotient if form.mantissa else quotient.round()).to(
        torch.int8 if dtype == "int4" else form.dtype
    )
    values = _join(codes, tiles).reshape(x.shape)
    return pack(values) if dtype == "int4" else values, scales.reshape(
        scale_shape(x.shape, scaling, group_size)
    )


def tile_scales(largest: Tensor, dtype: str) -> Tensor:
    """Return the scales of tiles whose numbers reach up to `largest` in size (float32): NaN unless that is finite."""
    scales = (largest / FORMATS[dtype].largest).clamp(min=SMALLEST_SCALE)
    return scales.where(scales.isfinite(), torch.nan)


def dequantize_reference(values: Tensor, scales: Tensor, dtype: str, scaling: str, group_size: int) -> Tensor:
    """Return value · scale in float32."""
    numbers = (unpack(values) if dtype == "int4" else values).float()
    tiles = tiles_of(numbers.shape, scaling, group_size)
    batch, rows, cols = tiles.grid
    product = _tile(numbers, tiles) * scales.reshape(batch, rows, 1, cols, 1)
    return _join(product, tiles).reshape(numbers.shape)


def pack(codes: Tensor) -> Tensor:
    """Store int4 codes (int8, last dimension even) two a byte, the first of each pair in the low half."""
    return ((codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)).view(torch.uint8)


def unpack(values: Tensor) -> Tensor:
    """Invert `pack`."""
    halves = torch.stack([values & 15, values >> 4], -1).flatten(-2).view(torch.int8)
    return (halves ^ 8) - 8


def _tile(x: Tensor, tiles: Tiles) -> Tensor:
    """View x as `(batch, tiles down, tile_rows, tiles across, tile_cols)`, filled up with zeros."""
    batch, down, across = tiles.grid
    spare = (across * tiles.tile_cols - tiles.cols, down * tiles.tile_rows - tiles.rows)
    whole = x.reshape(batch, tiles.rows, tiles.cols)
    if any(spare):
        whole = pad(whole, (0, spare[0], 0, spare[1]))
    return whole.view(batch, down, tiles.tile_rows, across, tiles.tile_cols)


def _join(tiled: Tensor, tiles: Tiles) -> Tensor:
    """Invert `_tile`: `(batch, rows, cols)`."""
    return tiled.flatten(3, 4).flatten(1, 2)[:, : tiles.rows, : tiles.cols]
