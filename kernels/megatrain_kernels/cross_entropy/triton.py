"""Cross entropy of rows as Triton kernels: one program a row, which it reads once for its statistics and once more
(from the GPU's cache, where a row of any vocabulary still lies) for its gradient.

A row's statistics are kept online (arXiv 1805.02867, algorithm 3): the largest logit so far, and the sum of the
exponentials relative to it. In signatures T is a tile, pointer or number at run time.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr
from triton.language import tensor as T

from megatrain_kernels.backend import interpreting
from megatrain_kernels.cross_entropy.options import LossOptions

LOG2E = math.log2(math.e)


@triton.jit
def capped(
    raw: T, cap: T, inner: T, CAPPED: constexpr,
) -> T:  # fmt: skip
    """cap · tanh(raw / cap) and its derivative; inner = 2 · log2(e) / cap. Exponents are negative: none overflows."""
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
    row: T, columns: T, size: T, cap: T, inner: T, CAPPED: constexpr,
) -> T:  # fmt: skip
    """Capped logits of a row, float32, -inf past its end, and the cap's derivative."""
    known = columns < size
    raw = tl.load(row + columns, mask=known, other=float("-inf")).to(tl.float32)
    wide, slope = capped(raw, cap, inner, CAPPED)
    return tl.where(known, wide, float("-inf")), slope


@triton.jit
def statistics(
    row: T, size: T, cap: T, inner: T, CAPPED: constexpr, BLOCK: constexpr,
) -> T:  # fmt: skip
    """The largest logit of a row, and the sum of exp(logit - largest)."""
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, size, BLOCK):
        wide, _ = load_columns(row, start + tl.arange(0, BLOCK), size, cap, inner, CAPPED)
        new_top = tl.maximum(top, tl.max(wide, 0))
        # Logits may be -inf, all of them so far too: -inf - (-inf) would not be a number.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - pivot) + tl.sum(tl.exp(wide - pivot), 0)
        top = new_top
    return top, total


@triton.jit
def wanted(
    row: T, target: T, first: T, size: T, cap: T, inner: T, CAPPED: constexpr,
) -> T:  # fmt: skip
    """Is the target in this shard of the vocabulary, which begins at `first`; its column, and its capped logit or 0."""
    here = (target >= first) & (target < first + size)
    column = tl.where(here, target - first, 0).to(tl.int32)
    raw = tl.load(row + column).to(tl.float32)
    wide, _ = capped(raw, cap, inner, CAPPED)
    return here, column, tl.where(here, wide, 0.0)


@triton.jit(do_not_specialize=["first", "rows"])
def partials_kernel(
    logits: T, targets: T, out: T, row_step: T, size: T, first: T, rows: T, cap: T, inner: T,
    CAPPED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Statistics and target logit of one row of a shard; out `(3, rows)`."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_step
    _, _, picked = wanted(row, tl.load(targets + index), first, size, cap, inner, CAPPED)
    top, total = statistics(row, size, cap, inner, CAPPED, BLOCK)
    tl.store(out + index, top)
    tl.store(out + rows + index, total)
    tl.store(out + 2 * rows + index, picked)


@triton.jit(do_not_specialize=["first", "ignore_index", "rows"])
def losses_kernel(
    logits: T, targets: T, whole: T, losses: T, gradient: T, row_step: T, gradient_step: T, size: T, first: T, rows: T,
    ignore_index: T, z_loss: T, cap: T, inner: T,
    SHARED: constexpr, GRADIENT: constexpr, CAPPED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Loss and gradient of one row. SHARED: `whole` `(2, rows)` has log-sum-exp and target logit over all shards.

    `gradient` may be `logits`: the target's logit is read before the sums over the row, all of which stand before
    the first store; then each program reads a block just before it overwrites it.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_step
    target = tl.load(targets + index)
    here, column, picked = wanted(row, target, first, size, cap, inner, CAPPED)
    if SHARED:
        lse = tl.load(whole + index)
        picked = tl.load(whole + rows + index)
    else:
        top, total = statistics(row, size, cap, inner, CAPPED, BLOCK)
        lse = top + tl.log(total)
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
    """cap and inner of `capped`."""
    return (0.0, 0.0) if options.softcap is None else (options.softcap, 2 * LOG2E / options.softcap)


def _constants(options: LossOptions, size: int) -> dict[str, Any]:
    """Sizes of blocks (not tuned): 16 elements a thread, so that a warp's loads are in flight together."""
    found: dict[str, Any] = {"CAPPED": options.softcap is not None}
    if interpreting():
        return found | {"BLOCK": 64}
    block = min(4096, max(128, triton.next_power_of_2(size)))
    return found | {"BLOCK": block, "num_warps": max(1, block // 512)}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def partials(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """`rows.partials` by a kernel."""
    logits, (rows, size) = _rows(logits), logits.shape
    out = logits.new_empty(3, rows, dtype=torch.float32)
    numbers = (logits.stride(0), size, options.first(size), rows, *_numbers(options))
    if rows:
        partials_kernel[(rows,)](logits, targets.contiguous(), out, *numbers, **_constants(options, size))
    return out


def losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, whole: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """`rows.losses` by a kernel; the rows of `gradient` are dense."""
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
    numbers = (size, options.first(size), rows, options.ignore_index, options.z_loss, *_numbers(options))
    if rows:
        losses_kernel[(rows,)](*tensors, *steps, *numbers, **flags)
    return made
