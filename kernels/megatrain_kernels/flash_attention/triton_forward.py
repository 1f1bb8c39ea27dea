"""Triton kernel of attention's forward pass (FlashAttention-2, arXiv 2307.08691, algorithm 1)."""

import triton
import triton.language as tl

from megatrain_kernels.flash_attention.triton_tiles import (
    PRECISION,
    doc_range,
    key_blocks,
    load_rows,
    raw_scores,
    settled,
    source,
    store_rows,
    visible,
)
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc: Tile,  # (BLOCK_M, BLOCK_V), the output so far, times l_i
    l_i: Tile,  # (BLOCK_M,), the sum so far of exp2(score - m_i)
    m_i: Tile,  # (BLOCK_M,), the largest score so far, in base 2
    q: Tile,  # (BLOCK_M, BLOCK_D)
    q_docs: Tile,  # (BLOCK_M,)
    k: Pointer,  # (k_seq, DIM)
    v: Pointer,  # (k_seq, V_DIM)
    docs: Pointer,  # (k_seq,)
    begin: Number, end: Number, m0: Number, k_seq: Number, k_step: Number, v_step: Number,
    q_offset: Number, window: Number, factor: Number, inner: Number,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr, MASKED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> tuple[Tile, Tile, Tile]:  # fmt: skip
    """Add keys begin to end to the running output, sum and maximum."""
    for n0 in range(begin, end, BLOCK_N):
        keys = load_rows(k, n0, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, MASKED, TMA)
        raw = raw_scores(q, keys, inner, CAPPED)
        columns = n0 + tl.arange(0, BLOCK_N)
        if MASKED:
            rows = m0 + tl.arange(0, BLOCK_M)
            seen = visible(rows[:, None], columns[None, :], k_seq, q_offset, window, CAUSAL, WINDOWED)
            raw = tl.where(seen, raw, float("-inf"))
        if DOCS and MASKED:
            k_docs = tl.load(docs + columns, mask=columns < k_seq, other=0)
            raw = tl.where(q_docs[:, None] == k_docs[None, :], raw, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(raw, 1) * factor)
        pivot = m_new
        if MASKED:  # a row may have seen nothing yet: -inf - (-inf) would not be a number
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(raw * factor - pivot[:, None])
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        values = load_rows(v, n0, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, MASKED, TMA)
        acc = settled(tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION), DOCS and MASKED)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["q_seq", "k_seq", "q_offset", "window", "size_class"])
def forward_kernel(
    q: Pointer,  # (batch, q_seq, heads, DIM)
    k: Pointer,  # (batch, k_seq, kv_heads, DIM)
    v: Pointer,  # (batch, k_seq, kv_heads, V_DIM)
    out: Pointer,  # (batch, q_seq, heads, V_DIM), dense
    lse: Pointer,  # (batch, heads, q_seq)
    docs: Pointer,  # (batch, k_seq), if DOCS
    doc_lows: Pointer,  # (batch, blocks of DOC_BLOCK queries)
    doc_highs: Pointer,  # as doc_lows
    doc_mixed: Pointer,  # as doc_lows
    q_row: Number, q_step: Number, q_head: Number,  # strides of batch, sequence and head; that of columns is 1
    k_row: Number, k_step: Number, k_head: Number, v_row: Number, v_step: Number, v_head: Number,
    heads: Number, q_seq: Number, k_seq: Number, q_offset: Number, window: Number, factor: Number, inner: Number,
    size_class: Number,  # tells autotuning long sequences from short ones
    GROUP: constexpr,  # query heads that share a key head
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> None:  # fmt: skip
    """Compute one block of queries of one head."""
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
    low, high, mixed, q_docs = 0, k_seq, 0, rows
    if DOCS:
        docs += batch * k_seq
        low, high, mixed = doc_range(doc_lows, doc_highs, doc_mixed, batch, m0, q_seq, BLOCK_M)
        q_docs = tl.load(docs + q_offset + rows, mask=rows < q_seq, other=0)
    begin, inside, outside, end = key_blocks(
        m0, low, high, mixed, k_seq, q_offset, window, CAUSAL, WINDOWED, DOCS, BLOCK_M, BLOCK_N)  # fmt: skip
    queries = load_rows(
        q + batch * q_row + head * q_head, m0, q_seq, q_step, BLOCK_M, DIM, BLOCK_D, True, False
    )
    k = source(k, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, TMA)
    v = source(v, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for phase in tl.static_range(3):  # up to inside, up to outside, up to end
        if WINDOWED or DOCS or phase != 0:
            first = begin if phase == 0 else (inside if phase == 1 else outside)
            last = inside if phase == 0 else (outside if phase == 1 else end)
            acc, l_i, m_i = _attend(
                acc, l_i, m_i, queries, q_docs, k, v, docs, first, last, m0, k_seq, k_step, v_step, q_offset, window,
                factor, inner, CAUSAL, WINDOWED, DOCS, CAPPED, phase != 1, DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M,
                BLOCK_N, TMA)  # fmt: skip
    unseen = l_i == 0.0
    l_i = tl.where(unseen, 1.0, l_i)
    acc = acc / l_i[:, None]
    out += batch * q_seq * heads * V_DIM + head * V_DIM
    store_rows(out, acc, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V)
    natural = tl.where(unseen, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    tl.store(lse + (batch * heads + head) * q_seq + rows, natural, mask=rows < q_seq)
