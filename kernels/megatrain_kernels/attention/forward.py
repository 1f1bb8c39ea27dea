"""Triton kernel of attention's forward pass (FlashAttention-2, arXiv 2307.08691, algorithm 1)."""

import triton
import triton.language as tl
from triton.language import constexpr
from triton.language import tensor as T

from megatrain_kernels.attention.tiles import (
    DOC_BLOCK,
    PRECISION,
    doc_range,
    key_blocks,
    load_rows,
    raw_scores,
    source,
    store_rows,
    visible,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc: T, total: T, top: T, q: T, q_docs: T, k: T, v: T, docs: T, begin: T, end: T, m0: T, k_seq: T,
    k_step: T, v_step: T, q_offset: T, window: T, factor: T, inner: T, CAUSAL: constexpr, WINDOWED: constexpr,
    DOCS: constexpr, CAPPED: constexpr, MASKED: constexpr, DIM: constexpr, V_DIM: constexpr,
    BLOCK_D: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> T:  # fmt: skip
    """Add keys begin to end to the running output, the running sum and the running maximum (in base 2)."""
    for n0 in range(begin, end, BLOCK_N):
        keys = load_rows(k, n0, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, MASKED, TMA)
        raw = raw_scores(q, keys, inner, CAPPED)
        columns = n0 + tl.arange(0, BLOCK_N)
        if MASKED:
            rows = m0 + tl.arange(0, BLOCK_M)
            seen = visible(rows[:, None], columns[None, :], k_seq, q_offset, window, CAUSAL, WINDOWED)
            raw = tl.where(seen, raw, float("-inf"))
        if DOCS:
            k_docs = tl.load(docs + columns, mask=columns < k_seq, other=0)
            raw = tl.where(q_docs[:, None] == k_docs[None, :], raw, float("-inf"))
        new_top = tl.maximum(top, tl.max(raw, 1) * factor)
        pivot = new_top
        if MASKED or DOCS:  # a row may have seen nothing yet: -inf - (-inf) would not be a number
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(raw * factor - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        values = load_rows(v, n0, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, MASKED, TMA)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["q_seq", "k_seq", "q_offset", "window", "size_class"])
def forward_kernel(
    q: T, k: T, v: T, out: T, lse: T, docs: T, doc_lows: T, doc_highs: T, q_row: T, q_step: T, q_head: T,
    k_row: T, k_step: T, k_head: T, v_row: T, v_step: T, v_head: T, heads: T, q_seq: T, k_seq: T, q_offset: T,
    window: T, factor: T, inner: T, size_class: T, GROUP: constexpr, CAUSAL: constexpr, WINDOWED: constexpr,
    DOCS: constexpr, CAPPED: constexpr, DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr,
    BLOCK_V: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> T:  # fmt: skip
    """One block of queries of one head. `*_row`, `*_step`, `*_head`: strides of batch, sequence and head."""
    blocks = tl.cdiv(q_seq, BLOCK_M)
    which = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest work first
    m0 = block * BLOCK_M
    batch, head = tl.cast(which // heads, tl.int64), tl.cast(which % heads, tl.int64)
    k += batch * k_row + head // GROUP * k_head
    v += batch * v_row + head // GROUP * v_head
    rows = m0 + tl.arange(0, BLOCK_M)
    low, high, q_docs = 0, k_seq, rows
    if DOCS:
        docs += batch * k_seq
        ranges = batch * tl.cdiv(q_seq, DOC_BLOCK)
        low, high = doc_range(doc_lows + ranges, doc_highs + ranges, m0, q_seq, BLOCK_M)
        q_docs = tl.load(docs + q_offset + rows, mask=rows < q_seq, other=0)
    begin, inside, outside, end = key_blocks(
        m0, low, high, k_seq, q_offset, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)  # fmt: skip
    queries = load_rows(
        q + batch * q_row + head * q_head, m0, q_seq, q_step, BLOCK_M, DIM, BLOCK_D, True, False
    )
    k = source(k, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, TMA)
    v = source(v, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for phase in tl.static_range(3):  # up to inside, up to outside, up to end
        if WINDOWED or phase != 0:
            first = begin if phase == 0 else (inside if phase == 1 else outside)
            last = inside if phase == 0 else (outside if phase == 1 else end)
            acc, total, top = _attend(
                acc, total, top, queries, q_docs, k, v, docs, first, last, m0, k_seq, k_step, v_step, q_offset, window,
                factor, inner, CAUSAL, WINDOWED, DOCS, CAPPED, phase != 1, DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M,
                BLOCK_N, TMA)  # fmt: skip
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    acc = acc / total[:, None]
    out += batch * q_seq * heads * V_DIM + head * V_DIM
    store_rows(out, acc, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V)
    natural = tl.where(unseen, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + (batch * heads + head) * q_seq + rows, natural, mask=rows < q_seq)
