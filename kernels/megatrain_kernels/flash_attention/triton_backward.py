"""Triton kernels of attention's backward pass (FlashAttention-2, arXiv 2307.08691, algorithm 2).

In seven products: the gradients of queries and those of keys have a kernel each, and scores are computed twice. Each
element is summed by one program in one order: no atomics, the same bits every time.

In five products (FUSED): the kernel of keys adds what its block contributes to the gradients of queries to a float32
tensor in memory, in no fixed order, so the last bits differ from call to call.
"""

import triton
import triton.language as tl

from megatrain_kernels.flash_attention.triton_tiles import (
    PRECISION,
    add_rows,
    doc_range,
    key_blocks,
    load_rows,
    query_blocks,
    raw_scores,
    settled,
    source,
    store_rows,
    target,
    visible,
)
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["q_seq"])
def delta_kernel(
    out: Pointer,  # (batch, q_seq, heads, V_DIM), dense
    grad_out: Pointer,  # as out
    grad_lse: Pointer,  # (batch, heads, q_seq)
    delta: Pointer,  # (batch, heads, q_seq)
    heads: Number, q_seq: Number, V_DIM: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr,
) -> None:  # fmt: skip
    """Compute delta = rowsum(out ∘ grad_out) - grad_lse of one block of queries; d(lse)/d(scores) = P."""
    blocks = tl.cdiv(q_seq, BLOCK_M)
    which, m0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    batch, head = tl.cast(which // heads, tl.int64), tl.cast(which % heads, tl.int64)
    at = batch * q_seq * heads * V_DIM + head * V_DIM
    mine = load_rows(out + at, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, True, False)
    grad = load_rows(grad_out + at, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, True, False)
    rows = m0 + tl.arange(0, BLOCK_M)
    at = (batch * heads + head) * q_seq + rows
    total = tl.sum(mine.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + at, total - tl.load(grad_lse + at, mask=rows < q_seq, other=0.0), mask=rows < q_seq)


@triton.jit
def _load_lse(
    lse: Pointer,  # (q_seq,)
    rows: Tile,  # (BLOCK_M,)
    q_seq: Number,
) -> Tile:  # fmt: skip
    """Load the log-sum-exp in base 2; infinite, so that P is zero, past the end and where a query sees no key."""
    value = tl.load(lse + rows, mask=rows < q_seq, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit(do_not_specialize=["q_seq", "padded"])
def prepare_kernel(
    out: Pointer,  # (batch, q_seq, heads, V_DIM), dense
    grad_out: Pointer,  # as out
    lse: Pointer,  # (batch, heads, q_seq)
    grad_lse: Pointer,  # as lse
    base: Pointer,  # (batch, heads, padded), log-sum-exps in base 2
    delta: Pointer,  # as base
    heads: Number, q_seq: Number, padded: Number, V_DIM: constexpr, BLOCK_V: constexpr, BLOCK_M: constexpr,
) -> None:  # fmt: skip
    """Compute what `delta_kernel` does and `_load_lse` reads, in rows of a length that tensor descriptors take."""
    blocks = tl.cdiv(padded, BLOCK_M)
    which, m0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    batch, head = tl.cast(which // heads, tl.int64), tl.cast(which % heads, tl.int64)
    at = batch * q_seq * heads * V_DIM + head * V_DIM
    mine = load_rows(out + at, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, True, False)
    grad = load_rows(grad_out + at, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, True, False)
    rows = m0 + tl.arange(0, BLOCK_M)
    known = batch * heads + head
    total = tl.sum(mine.to(tl.float32) * grad.to(tl.float32), 1)
    total -= tl.load(grad_lse + known * q_seq + rows, mask=rows < q_seq, other=0.0)
    tl.store(delta + known * padded + rows, total, mask=rows < padded)
    tl.store(base + known * padded + rows, _load_lse(lse + known * q_seq, rows, q_seq), mask=rows < padded)


@triton.jit
def _push_queries(
    grad_q: Tile,  # (BLOCK_M, BLOCK_D)
    q: Tile,  # (BLOCK_M, BLOCK_D)
    grad: Tile,  # (BLOCK_M, BLOCK_V), the output's gradient
    lse: Tile,  # (BLOCK_M,), in base 2
    delta: Tile,  # (BLOCK_M,)
    q_docs: Tile,  # (BLOCK_M,)
    k: Pointer,  # (k_seq, DIM)
    v: Pointer,  # (k_seq, V_DIM)
    docs: Pointer,  # (k_seq,)
    begin: Number, end: Number, m0: Number, k_seq: Number, k_step: Number, v_step: Number,
    q_offset: Number, window: Number, factor: Number, inner: Number,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr, MASKED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> Tile:  # fmt: skip
    """Add what keys begin to end contribute to grad_q / scale."""
    for n0 in range(begin, end, BLOCK_N):
        keys = load_rows(k, n0, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, MASKED, TMA)
        values = load_rows(v, n0, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, MASKED, TMA)
        raw = raw_scores(q, keys, inner, CAPPED)
        slope = 1.0
        if CAPPED:
            slope = 1.0 - raw * raw
        columns = n0 + tl.arange(0, BLOCK_N)
        if MASKED:
            rows = m0 + tl.arange(0, BLOCK_M)
            seen = visible(rows[:, None], columns[None, :], k_seq, q_offset, window, CAUSAL, WINDOWED)
            raw = tl.where(seen, raw, float("-inf"))
        if DOCS and MASKED:
            k_docs = tl.load(docs + columns, mask=columns < k_seq, other=0)
            raw = tl.where(q_docs[:, None] == k_docs[None, :], raw, float("-inf"))
        p = tl.exp2(raw * factor - lse[:, None])
        grad_p = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None]) * slope
        grad_q = settled(
            tl.dot(grad_s.to(keys.dtype), keys, grad_q, input_precision=PRECISION), DOCS and MASKED
        )
    return grad_q


@triton.jit(do_not_specialize=["q_seq", "k_seq", "q_offset", "window", "size_class"])
def query_kernel(
    q: Pointer,  # (batch, q_seq, heads, DIM)
    k: Pointer,  # (batch, k_seq, kv_heads, DIM)
    v: Pointer,  # (batch, k_seq, kv_heads, V_DIM)
    grad_out: Pointer,  # (batch, q_seq, heads, V_DIM), dense
    lse: Pointer,  # (batch, heads, q_seq)
    delta: Pointer,  # (batch, heads, q_seq)
    grad_q: Pointer,  # (batch, q_seq, heads, DIM), dense
    docs: Pointer,  # (batch, k_seq), if DOCS
    doc_lows: Pointer,  # (batch, blocks of DOC_BLOCK queries)
    doc_highs: Pointer,  # as doc_lows
    doc_mixed: Pointer,  # as doc_lows
    q_row: Number, q_step: Number, q_head: Number,  # strides of batch, sequence and head; that of columns is 1
    k_row: Number, k_step: Number, k_head: Number, v_row: Number, v_step: Number, v_head: Number,
    heads: Number, q_seq: Number, k_seq: Number, q_offset: Number, window: Number, scale: Number, factor: Number,
    inner: Number, size_class: Number,  # the latter tells autotuning long sequences from short ones
    GROUP: constexpr,  # query heads that share a key head
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of one block of queries of one head."""
    blocks = tl.cdiv(q_seq, BLOCK_M)
    which = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
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
    place = batch * q_seq * heads + head
    grad = load_rows(grad_out + place * V_DIM, m0, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, True, False)
    at = (batch * heads + head) * q_seq
    row_lse = _load_lse(lse + at, rows, q_seq)
    row_delta = tl.load(delta + at + rows, mask=rows < q_seq, other=0.0)
    k = source(k, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, TMA)
    v = source(v, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):  # up to inside, up to outside, up to end
        if WINDOWED or DOCS or phase != 0:
            first = begin if phase == 0 else (inside if phase == 1 else outside)
            last = inside if phase == 0 else (outside if phase == 1 else end)
            acc = _push_queries(
                acc, queries, grad, row_lse, row_delta, q_docs, k, v, docs, first, last, m0, k_seq, k_step, v_step,
                q_offset, window, factor, inner, CAUSAL, WINDOWED, DOCS, CAPPED, phase != 1, DIM, V_DIM, BLOCK_D,
                BLOCK_V, BLOCK_M, BLOCK_N, TMA)  # fmt: skip
    store_rows(grad_q + place * DIM, acc * scale, m0, q_seq, heads * DIM, BLOCK_M, DIM, BLOCK_D)


@triton.jit
def _push_keys(
    grad_k: Tile,  # (BLOCK_N, BLOCK_D)
    grad_v: Tile,  # (BLOCK_N, BLOCK_V)
    k: Tile,  # (BLOCK_N, BLOCK_D)
    v: Tile,  # (BLOCK_N, BLOCK_V)
    k_docs: Tile,  # (BLOCK_N,)
    q: Pointer,  # (q_seq, DIM)
    grad_out: Pointer,  # (q_seq, V_DIM)
    lse: Pointer,  # (q_seq,)
    delta: Pointer,  # (q_seq,)
    docs: Pointer,  # (k_seq,)
    sum_q: Pointer,  # (q_seq, DIM), float32, if FUSED
    begin: Number, end: Number, n0: Number, q_seq: Number, k_seq: Number, q_step: Number, grad_step: Number,
    sum_step: Number, q_offset: Number, window: Number, factor: Number, inner: Number,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr, MASKED: constexpr, FUSED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> tuple[Tile, Tile]:  # fmt: skip
    """Add what queries begin to end contribute to grad_k / scale and grad_v, and if FUSED to sum_q.

    Tiles of scores are `(keys, queries)`.
    """
    for m0 in range(begin, end, BLOCK_M):
        queries = load_rows(q, m0, q_seq, q_step, BLOCK_M, DIM, BLOCK_D, MASKED, TMA)
        grad = load_rows(grad_out, m0, q_seq, grad_step, BLOCK_M, V_DIM, BLOCK_V, MASKED, TMA)
        rows = m0 + tl.arange(0, BLOCK_M)
        row_lse = _load_lse(lse, rows, q_seq)
        row_delta = tl.load(delta + rows, mask=rows < q_seq, other=0.0)
        raw = raw_scores(k, queries, inner, CAPPED)
        slope = 1.0
        if CAPPED:
            slope = 1.0 - raw * raw
        if MASKED:
            columns = n0 + tl.arange(0, BLOCK_N)
            seen = visible(rows[None, :], columns[:, None], k_seq, q_offset, window, CAUSAL, WINDOWED)
            raw = tl.where(seen, raw, float("-inf"))
        if DOCS and MASKED:
            q_docs = tl.load(docs + q_offset + rows, mask=rows < q_seq, other=0)
            raw = tl.where(k_docs[:, None] == q_docs[None, :], raw, float("-inf"))
        p = tl.exp2(raw * factor - row_lse[None, :])
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_s = (p * (grad_p - row_delta[None, :]) * slope).to(queries.dtype)
        grad_k = settled(tl.dot(grad_s, queries, grad_k, input_precision=PRECISION), True)
        if FUSED:
            part = tl.dot(tl.trans(grad_s), k, input_precision=PRECISION)
            add_rows(sum_q, part, m0, q_seq, sum_step, BLOCK_M, DIM, BLOCK_D, TMA)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["q_seq", "k_seq", "q_offset", "window", "size_class"])
def key_kernel(
    q: Pointer,  # (batch, q_seq, heads, DIM)
    k: Pointer,  # (batch, k_seq, kv_heads, DIM)
    v: Pointer,  # (batch, k_seq, kv_heads, V_DIM)
    grad_out: Pointer,  # (batch, q_seq, heads, V_DIM), dense
    lse: Pointer,  # (batch, heads, q_seq)
    delta: Pointer,  # (batch, heads, q_seq)
    grad_k: Pointer,  # (batch, k_seq, kv_heads, DIM), dense
    grad_v: Pointer,  # (batch, k_seq, kv_heads, V_DIM), dense
    sum_q: Pointer,  # (batch, q_seq, heads, DIM), float32, if FUSED: gradients of queries / scale are added
    docs: Pointer,  # (batch, k_seq), if DOCS
    doc_lows: Pointer,  # (batch, blocks of DOC_BLOCK keys)
    doc_highs: Pointer,  # as doc_lows
    doc_mixed: Pointer,  # as doc_lows
    q_row: Number, q_step: Number, q_head: Number,  # strides of batch, sequence and head; that of columns is 1
    k_row: Number, k_step: Number, k_head: Number, v_row: Number, v_step: Number, v_head: Number,
    kv_heads: Number, q_seq: Number, k_seq: Number, q_offset: Number, window: Number, scale: Number, factor: Number,
    inner: Number, size_class: Number,  # the latter tells autotuning long sequences from short ones
    GROUP: constexpr,  # query heads that share a key head
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, CAPPED: constexpr, FUSED: constexpr,
    DIM: constexpr, V_DIM: constexpr, BLOCK_D: constexpr, BLOCK_V: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, TMA: constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of one block of keys of one key head, over the query heads of its group in turn."""
    blocks = tl.cdiv(k_seq, BLOCK_N)
    which, n0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    batch, kv_head = tl.cast(which // kv_heads, tl.int64), tl.cast(which % kv_heads, tl.int64)
    columns = n0 + tl.arange(0, BLOCK_N)
    low, high, mixed, k_docs = 0, q_seq, 0, columns
    if DOCS:
        docs += batch * k_seq
        low, high, mixed = doc_range(doc_lows, doc_highs, doc_mixed, batch, n0, k_seq, BLOCK_N)
        k_docs = tl.load(docs + columns, mask=columns < k_seq, other=0)
    begin, inside, outside, end = query_blocks(
        n0, low, high, mixed, q_seq, q_offset, window, CAUSAL, WINDOWED, DOCS, BLOCK_M, BLOCK_N)  # fmt: skip
    k, v = k + batch * k_row + kv_head * k_head, v + batch * v_row + kv_head * v_head
    keys = load_rows(k, n0, k_seq, k_step, BLOCK_N, DIM, BLOCK_D, True, False)
    values = load_rows(v, n0, k_seq, v_step, BLOCK_N, V_DIM, BLOCK_V, True, False)
    sum_k, sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    heads = kv_heads * GROUP
    for member in range(GROUP):
        head = kv_head * GROUP + member
        at = (batch * heads + head) * q_seq
        mine = source(q + batch * q_row + head * q_head, q_seq, q_step, BLOCK_M, DIM, BLOCK_D, TMA)
        row = batch * q_seq * heads + head
        grad = source(grad_out + row * V_DIM, q_seq, heads * V_DIM, BLOCK_M, V_DIM, BLOCK_V, TMA)
        sums = target(sum_q + row * DIM, q_seq, heads * DIM, BLOCK_M, DIM, BLOCK_D, FUSED and TMA)
        for phase in tl.static_range(3):
            if CAUSAL or DOCS or phase != 0:
                first = begin if phase == 0 else (inside if phase == 1 else outside)
                last = inside if phase == 0 else (outside if phase == 1 else end)
                sum_k, sum_v = _push_keys(
                    sum_k, sum_v, keys, values, k_docs, mine, grad, lse + at, delta + at, docs, sums, first, last,
                    n0, q_seq, k_seq, q_step, heads * V_DIM, heads * DIM, q_offset, window, factor, inner, CAUSAL,
                    WINDOWED, DOCS, CAPPED, phase != 1, FUSED, DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
                    TMA)  # fmt: skip
    place = batch * k_seq * kv_heads + kv_head
    store_rows(grad_k + place * DIM, sum_k * scale, n0, k_seq, kv_heads * DIM, BLOCK_N, DIM, BLOCK_D)
    store_rows(grad_v + place * V_DIM, sum_v, n0, k_seq, kv_heads * V_DIM, BLOCK_N, V_DIM, BLOCK_V)
