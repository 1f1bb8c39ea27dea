"""Triton kernels of cross entropy: one program a row.

A program reads its row once for the statistics and once more (from the GPU's cache, where a row of any vocabulary still
lies) for the gradient. The statistics are kept online (arXiv 1805.02867, algorithm 3): m_i, the largest logit so far,
and l_i, the sum of exp(logit - m_i).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr
from megatrain_kernels.xent.reference import LossOptions

LOG2E = math.log2(math.e)


@triton.jit
def capped(raw: Tile, cap: Number, inner: Number, CAPPED: constexpr) -> tuple[Tile, Tile]:
    """Return cap · tanh(raw / cap) and its derivative, by exp2 with inner = 2 · log2(e) / cap.

    Exponents are negative, so none overflows.
    """
    if CAPPED:
        shrunk = tl.exp2(-tl.abs(raw) * inner)
        size = cap * (1.0 - shrunk) / (1.0 + shrunk)
        wide = tl.where(raw < 0.0, -size, size)
        slope = 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))
    else:
        wide = raw
        slope = 1.0
    return wide, slope


@triton.jit
def load_columns(
    row: Pointer,  # (size,)
    columns: Tile,  # (BLOCK,)
    size: Number, cap: Number, inner: Number, CAPPED: constexpr,
) -> tuple[Tile, Tile]:  # fmt: skip
    """Load a row's capped logits, float32, -inf past its end, and the cap's derivative."""
    known = columns < size
    raw = tl.load(row + columns, mask=known, other=float("-inf")).to(tl.float32)
    wide, slope = capped(raw, cap, inner, CAPPED)
    return tl.where(known, wide, float("-inf")), slope


@triton.jit
def statistics(
    row: Pointer,  # (size,)
    size: Number, cap: Number, inner: Number, CAPPED: constexpr, BLOCK: constexpr,
) -> tuple[Number, Number]:  # fmt: skip
    """Return the largest logit of a row, m_i, and the sum of exp(logit - m_i), l_i."""
    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.zeros((), tl.float32)
    for start in range(0, size, BLOCK):
        wide, _ = load_columns(row, start + tl.arange(0, BLOCK), size, cap, inner, CAPPED)
        m_new = tl.maximum(m_i, tl.max(wide, 0))
        # Logits may be -inf, all of them so far too: -inf - (-inf) would not be a number.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - pivot) + tl.sum(tl.exp(wide - pivot), 0)
        m_i = m_new
    return m_i, l_i


@triton.jit
def locate_target(
    row: Pointer,  # (size,)
    target: Number,
    first: Number,  # the token of the shard's first column
    size: Number, cap: Number, inner: Number, CAPPED: constexpr,
) -> tuple[Number, Number, Number]:  # fmt: skip
    """Return whether this shard of the vocabulary has the target, its column, and its capped logit or 0."""
    here = (target >= first) & (target < first + size)
    column = tl.where(here, target - first, 0).to(tl.int32)
    raw = tl.load(row + column).to(tl.float32)
    wide, _ = capped(raw, cap, inner, CAPPED)
    return here, column, tl.where(here, wide, 0.0)


@triton.jit(do_not_specialize=["first", "rows"])
def partials_kernel(
    logits: Pointer,  # (rows, size)
    targets: Pointer,  # (rows,)
    out: Pointer,  # (3, rows)
    row_step: Number,  # stride of rows
    size: Number, first: Number, rows: Number, cap: Number, inner: Number,
    CAPPED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Store the statistics and the target's logit of one row of a shard."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_step
    _, _, picked = locate_target(row, tl.load(targets + index), first, size, cap, inner, CAPPED)
    m_i, l_i = statistics(row, size, cap, inner, CAPPED, BLOCK)
    tl.store(out + index, m_i)
    tl.store(out + rows + index, l_i)
    tl.store(out + 2 * rows + index, picked)


@triton.jit(do_not_specialize=["first", "ignore_index", "rows"])
def losses_kernel(
    logits: Pointer,  # (rows, size)
    targets: Pointer,  # (rows,)
    whole: Pointer,  # (2, rows), log-sum-exp and target logit over all shards, if SHARED
    losses: Pointer,  # (rows,)
    gradient: Pointer,  # (rows, size), if GRADIENT; may be `logits`
    row_step: Number, gradient_step: Number,  # strides of rows
    size: Number, first: Number, rows: Number, ignore_index: Number, z_loss: Number, cap: Number, inner: Number,
    SHARED: constexpr, GRADIENT: constexpr, CAPPED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Store the loss and the gradient of one row.

    `gradient` may be `logits`: the target's logit is read before the sums over the row, all of which stand before
    the first store; then each program reads a block just before it overwrites it.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_step
    target = tl.load(targets + index)
    here, column, picked = locate_target(row, target, first, size, cap, inner, CAPPED)
    if SHARED:
        lse = tl.load(whole + index)
        picked = tl.load(whole + rows + index)
    else:
        m_i, l_i = statistics(row, size, cap, inner, CAPPED, BLOCK)
        lse = m_i + tl.log(l_i)
        picked = tl.where(here, picked, float("nan"))  # a target outside of the vocabulary must not pass
    valid = target != ignore_index
    tl.store(losses + index, tl.where(valid, lse - picked + z_loss * lse * lse, 0.0))
    if GRADIENT:
        made = gradient + index * gradient_step
        factor = 1.0 + 2.0 * z_loss * lse
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            wide, slope = load_columns(row, columns, size, cap, inner, CAPPED)
            p = tl.exp(wide - lse) * factor
            p = tl.where(here & (columns == column), p - 1.0, p) * slope
            p = tl.where(valid, p, 0.0)
            tl.store(made + columns, p.to(gradient.dtype.element_ty), mask=columns < size)


def _numbers(options: LossOptions) -> tuple[float, float]:
    """Return cap and inner of `capped`."""
    return (0.0, 0.0) if options.softcap is None else (options.softcap, 2 * LOG2E / options.softcap)


def _constants(options: LossOptions, size: int) -> dict[str, Any]:
    """Choose sizes of blocks (not tuned): 16 elements a thread, so that a warp's loads are in flight together."""
    found: dict[str, Any] = {"CAPPED": options.softcap is not None}
    if interpreting():
        return found | {"BLOCK": 64}
    block = min(4096, max(128, triton.next_power_of_2(size)))
    return found | {"BLOCK": block, "num_warps": max(1, block // 512)}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def partials(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return what `torch.partials` returns."""
    logits, (rows, size) = _rows(logits), logits.shape
    out = logits.new_empty(3, rows, dtype=torch.float32)
    numbers = (logits.stride(0), size, options.first_token, rows, *_numbers(options))
    if rows:
        partials_kernel[(rows,)](logits, targets.contiguous(), out, *numbers, **_constants(options, size))
    return out


def losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, whole: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Return what `torch.losses` returns; the rows of `gradient` are dense."""
    logits, (rows, size) = _rows(logits), logits.shape
    made = logits.new_empty(rows, dtype=torch.float32)
    targets = targets.contiguous()
    tensors = (
        logits,
        targets,
        made if whole is None else whole,
        made,
        made if gradient is None else gradient,
    )
    steps = (logits.stride(0), 0 if gradient is None else gradient.stride(0))
    flags = {"SHARED": whole is not None, "GRADIENT": gradient is not None, **_constants(options, size)}
    numbers = (size, options.first_token, rows, options.ignore_index, options.z_loss, *_numbers(options))
    if rows:
        losses_kernel[(rows,)](*tensors, *steps, *numbers, **flags)
    return made
