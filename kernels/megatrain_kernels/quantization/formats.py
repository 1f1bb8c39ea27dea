"""Number formats of 8 and 4 bits, and the tiles of a tensor that share a scale."""

from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """Numbers that a code can stand for; the largest in size takes a tile's largest number."""

    dtype: torch.dtype
    """Of the stored values; two int4 make one byte."""
    largest: float
    mantissa: int = 0
    """Bits; 0: whole numbers."""
    bias: int = 0
    """Of the exponent."""


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
        """Tiles along batch, rows and columns."""
        return self.batch, -(-self.rows // self.tile_rows), -(-self.cols // self.tile_cols)


def tiles_of(shape: torch.Size, scaling: str, group_size: int) -> Tiles:
    """How `scaling` cuts a tensor of that shape; all of it is one row under "tensor".

    Raises:
        ValueError: no such scaling, or the tensor has no rows for it.
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
    """Shape of the scales of a tensor of `shape`: one for each tile, with its number of dimensions ("tensor": 0)."""
    if scaling == "tensor":
        return ()
    _, rows, cols = tiles_of(shape, scaling, group_size).grid
    return (*shape[:-2], rows, cols) if scaling == "block" else (*shape[:-1], cols)


def unpacked_shape(values: Tensor, dtype: str) -> torch.Size:
    """Shape of the numbers that `values` holds."""
    doubled = 2 if dtype == "int4" else 1
    return torch.Size((*values.shape[:-1], values.shape[-1] * doubled))
