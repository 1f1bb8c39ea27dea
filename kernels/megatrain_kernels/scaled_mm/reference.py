"""The product of two fp8 matrices with scales, written out."""

import torch
from torch import Tensor

Tile = tuple[int, int]
"""Rows and columns that share a scale."""


def tile_of(shape: torch.Size, scales: torch.Size, group_size: int) -> Tile:
    """Return the tiles of a matrix of `shape` that has scales of shape `scales`, as `quantize` made them.

    Raises:
        ValueError: no scaling of that matrix gives such scales.
    """
    (rows, cols), groups = shape, -(-shape[1] // group_size)
    if len(scales) == 0:
        return rows, cols
    if scales == (rows, 1):
        return 1, cols
    if scales == (rows, groups):
        return 1, group_size
    if scales == (-(-rows // group_size), groups):
        return group_size, group_size
    raise ValueError(f"scales {tuple(scales)} do not fit a matrix {tuple(shape)} in groups of {group_size}")


def scaled_matmul_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, group_size: int
) -> Tensor:
    """Return (a · scale_a) (b · scale_b)ᵀ in `out_dtype`, of a `(m, k)` and b `(n, k)`; float32 at least inside."""
    wide = torch.promote_types(out_dtype, torch.float32)
    left, right = (
        _scaled(each.to(wide), scale.to(wide), group_size) for each, scale in ((a, scale_a), (b, scale_b))
    )
    return (left @ right.T).to(out_dtype)


def _scaled(x: Tensor, scale: Tensor, group_size: int) -> Tensor:
    if scale.ndim == 2:
        for dim, size in enumerate(tile_of(x.shape, scale.shape, group_size)):
            scale = scale.repeat_interleave(size, dim)[: x.shape[0], : x.shape[1]]
    return x * scale
