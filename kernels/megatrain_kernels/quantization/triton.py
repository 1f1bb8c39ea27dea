"""Triton kernels of quantization and its inverse.

Codes are made and read by arithmetic on the numbers' bits. So they are the same on every GPU, even without fp8, and in
Triton's interpreter, whose own casts to fp8 truncate.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr
from megatrain_kernels.quantization.reference import (
    FORMATS,
    SMALLEST_SCALE,
    scale_shape,
    tiles_of,
    unpacked_shape,
)

WIDEST = 1024
"""Columns that a program takes at a time."""
ELEMENTS = 4096
"""About so many numbers a program takes at a time, where tiles are no blocks."""


@triton.jit
def encode(y: Tile, MANTISSA: constexpr, BIAS: constexpr) -> Tile:
    """Return the codes (int32) nearest to the float32 y, ties to even; y lies within the format's range.

    A float is rounded to fewer bits by adding half of what falls away (and the last bit that stays, less one) to its
    bits; numbers below the least normal one by adding a power of two, whose last bit is the format's last.
    """
    if MANTISSA == 0:
        # 1.5 · 2^23: the last bit is worth 1. Its bits and those of the sum differ by the whole number.
        return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    last = (size >> (23 - MANTISSA)) & 1
    normal = (size + ((1 << (22 - MANTISSA)) - 1) + last) >> (23 - MANTISSA)
    normal -= (127 - BIAS) << MANTISSA
    unit_bits: constexpr = (151 - BIAS - MANTISSA) << 23
    unit = tl.full(y.shape, unit_bits, tl.int32).to(tl.float32, bitcast=True)
    small = (tl.abs(y) + unit).to(tl.int32, bitcast=True) - unit_bits
    return tl.where(size < ((128 - BIAS) << 23), small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def decode(codes: Tile, MANTISSA: constexpr, BIAS: constexpr) -> Tile:
    """Return the numbers (float32) of codes (int32, of 8 bits, or signed where MANTISSA is 0).

    No code stands for NaN or infinity.
    """
    if MANTISSA == 0:
        return codes.to(tl.float32)
    size = codes & 0x7F
    normal = ((size << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    unit_bits: constexpr = (128 - BIAS - MANTISSA) << 23  # the least number above 0
    small = size.to(tl.float32) * tl.full(codes.shape, unit_bits, tl.int32).to(tl.float32, bitcast=True)
    found = tl.where(size < (1 << MANTISSA), small, normal)
    return tl.where(codes >= 0x80, -found, found)


@triton.jit
def quantize_kernel(
    x: Pointer,  # (batch, n_rows, n_cols)
    values: Pointer,  # (batch, n_rows, n_cols), bytes; half as many columns if PACKED
    scales: Pointer,  # (), (batch * n_rows, tiles across) or, if WHOLE, (batch, tiles down, tiles across)
    given: Pointer,  # (), if GIVEN
    n_rows: Number, n_cols: Number, tile_rows: Number, tile_cols: Number,
    x_batch: Number, x_row: Number, x_col: Number,  # strides
    LARGEST: constexpr, MANTISSA: constexpr, BIAS: constexpr, SMALLEST: constexpr,
    GIVEN: constexpr, WHOLE: constexpr, PACKED: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
) -> None:  # fmt: skip
    """Quantize one tile (WHOLE), or one tile of each of some rows.

    If GIVEN, the tensor's largest size is known, and tiles just divide the work: all compute the only scale.
    """
    down, across, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (down * tile_rows + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = across * tile_cols
    last = tl.minimum(first + tile_cols, n_cols)
    here = rows < tl.minimum(down * tile_rows + tile_rows, n_rows)
    cols = first + tl.arange(0, BLOCK_N)
    x_at = x + batch * x_batch + rows[:, None] * x_row + cols[None, :].to(tl.int64) * x_col
    # Sizes are compared by their bits, in which NaN is larger than all else, and so is not lost.
    largest_bits = tl.zeros((BLOCK_M,), tl.int32)
    if GIVEN:
        largest_bits += tl.load(given).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        for start in range(0, last - first, BLOCK_N):
            known = here[:, None] & (cols < last - start)[None, :]
            found = tl.load(x_at + tl.cast(start, tl.int64) * x_col, mask=known, other=0.0).to(tl.float32)
            largest_bits = tl.maximum(largest_bits, tl.max(found.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        if WHOLE:
            largest_bits = tl.zeros((BLOCK_M,), tl.int32) + tl.max(largest_bits, 0)
    finite = largest_bits < 0x7F800000
    largest = tl.where(finite, largest_bits, 0).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(largest, tl.full((BLOCK_M,), LARGEST, tl.float32)), SMALLEST)
    n_across, kept = tl.num_programs(1), tl.where(finite, scale, float("nan"))
    if GIVEN:
        tl.store(scales + rows * 0, kept, mask=tl.arange(0, BLOCK_M) + down + across + batch == 0)
    elif WHOLE:
        at = (batch * tl.num_programs(0) + down) * n_across + across
        tl.store(scales + at + tl.zeros((BLOCK_M,), tl.int64), kept, mask=tl.arange(0, BLOCK_M) == 0)
    else:
        tl.store(scales + (batch * n_rows + rows) * n_across + across, kept, mask=here)
    inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.where(finite, scale, 1.0))
    width = n_cols // 2 if PACKED else n_cols
    out_at = values + (batch * n_rows + rows[:, None]) * width
    for start in range(0, last - first, BLOCK_N):
        known = here[:, None] & (cols < last - start)[None, :]
        found = tl.load(x_at + tl.cast(start, tl.int64) * x_col, mask=known, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(found * inverse[:, None], -LARGEST), LARGEST)
        codes = encode(tl.where(finite[:, None], scaled, 0.0), MANTISSA, BIAS)
        if PACKED:
            low, high = tl.split(tl.reshape(codes, (BLOCK_M, BLOCK_N // 2, 2)))
            bytes_ = (low & 15) | ((high & 15) << 4)
            pairs = (first + start) // 2 + tl.arange(0, BLOCK_N // 2)
            tl.store(
                out_at + pairs[None, :], bytes_.to(tl.uint8), mask=here[:, None] & (2 * pairs < last)[None, :]
            )
        else:
            tl.store(out_at + (cols + start)[None, :], (codes & 0xFF).to(tl.uint8), mask=known)


@triton.jit
def dequantize_kernel(
    values: Pointer,  # (batch, n_rows, n_cols), bytes; half as many columns if PACKED
    scales: Pointer,  # (batch, n_down, n_across)
    out: Pointer,  # (batch, n_rows, n_cols)
    n_rows: Number, n_cols: Number, tile_rows: Number, tile_cols: Number, n_down: Number, n_across: Number,
    MANTISSA: constexpr, BIAS: constexpr, PACKED: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
) -> None:  # fmt: skip
    """Compute out = value · scale, all stored row by row."""
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    line = batch * n_rows + rows[:, None]
    if PACKED:
        pair = tl.load(values + line * (n_cols // 2) + (cols // 2)[None, :], mask=known, other=0).to(tl.int32)
        half = tl.where((cols % 2 == 1)[None, :], pair >> 4, pair & 15)
        codes = (half ^ 8) - 8
    else:
        codes = tl.load(values + line * n_cols + cols[None, :], mask=known, other=0).to(tl.int32)
        if MANTISSA == 0:
            codes = (codes ^ 128) - 128
    at = (batch * n_down + (rows // tile_rows)[:, None]) * n_across + (cols // tile_cols)[None, :]
    product = decode(codes, MANTISSA, BIAS) * tl.load(scales + at, mask=known, other=0.0)
    tl.store(out + line * n_cols + cols[None, :], product.to(out.dtype.element_ty), mask=known)


def _pieces(rows: int, cols: int) -> tuple[int, int]:
    """Return the rows and columns (powers of two) that one program takes at a time."""
    wide = min(WIDEST, max(16, triton.next_power_of_2(cols)))
    return min(max(1, ELEMENTS // wide), triton.next_power_of_2(max(1, rows))), wide


def quantize(x: Tensor, dtype: str, scaling: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Return what `reference.quantize_reference` returns, bit by bit; x has any strides."""
    form, tiles = FORMATS[dtype], tiles_of(x.shape, scaling, group_size)
    packed, is_block, given = dtype == "int4", scaling == "block", scaling == "tensor"
    view = x.reshape(tiles.batch if is_block else 1, -1, x.shape[-1])
    halves = 2 if packed else 1
    values = torch.empty((*x.shape[:-1], x.shape[-1] // halves), dtype=form.dtype, device=x.device)
    scales = torch.empty(scale_shape(x.shape, scaling, group_size), dtype=torch.float32, device=x.device)
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) if given else scales
    rows, cols = view.shape[1:]
    if is_block:
        block_m = block_n = max(16, triton.next_power_of_2(group_size))
        work = (group_size, group_size)
    else:
        block_m, block_n = _pieces(rows, cols if given else tiles.tile_cols)
        work = (block_m, block_n if given else tiles.tile_cols)
    grid = (triton.cdiv(rows, work[0]), triton.cdiv(cols, work[1]), view.shape[0])
    constants: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SMALLEST": SMALLEST_SCALE}
    constants |= {"GIVEN": given, "WHOLE": is_block, "PACKED": packed, "num_warps": 8 if is_block else 4}
    numbers = (rows, cols, *work, *view.stride())
    quantize_kernel[grid](view, values.view(torch.uint8), scales, largest, *numbers, *form[1:], **constants)
    return values, scales


def dequantize(
    values: Tensor, scales: Tensor, dtype: str, scaling: str, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    """Return what `reference.dequantize_reference` returns, bit by bit, in `out_dtype`."""
    form, shape = FORMATS[dtype], unpacked_shape(values, dtype)
    tiles = tiles_of(shape, scaling, group_size)
    out = torch.empty(shape, dtype=out_dtype, device=values.device)
    # One scale for all: the tensor's rows lie in one tile that is as high as all of them.
    rows, cols = (shape[:-1].numel(), shape[-1]) if scaling == "tensor" else (tiles.rows, tiles.cols)
    tile = (rows, cols) if scaling == "tensor" else (tiles.tile_rows, tiles.tile_cols)
    _, down, across = tiles.grid
    block_m, block_n = _pieces(rows, cols)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(cols, block_n), tiles.batch)
    stored = values.contiguous().view(torch.uint8)
    constants = {"PACKED": dtype == "int4", "BLOCK_M": block_m, "BLOCK_N": block_n}
    numbers = (rows, cols, *tile, down, across)
    dequantize_kernel[grid](stored, scales.contiguous(), out, *numbers, *form[2:], **constants)
    return out
