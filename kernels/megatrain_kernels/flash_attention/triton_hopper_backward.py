"""Attention's backward pass for Hopper, in five products: a program takes a block of keys, and queries block by block.

As in FlashAttention-3 (arXiv 2407.08608): eight warps compute, one copies queries and the output's gradients ahead, and
one adds what the block contributes to the queries' gradients to a float32 tensor in memory, in no fixed order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megatrain_kernels.flash_attention.triton_hopper_names import (
    add,
    doc_range,
    load,
    query_blocks,
    store,
    together,
)
from megatrain_kernels.jit_types import Number, Pack, Pointer, Tile, constexpr

WARPS = gl.constexpr(8)


@gluon.jit
def _work(
    lows: Pointer,  # (batch, groups of DOC_BLOCK keys)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    numbers: Pack,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, M: constexpr, N: constexpr,
) -> Pack:  # fmt: skip
    """Return the program's row, key head and first key; and the queries to visit, as `query_blocks` does."""
    batches, kv_heads, q_seq, k_seq, q_offset, window = numbers
    pairs = batches * kv_heads
    n0 = gl.program_id(0) // pairs * N
    which = gl.program_id(0) % pairs
    batch, kv_head = which // kv_heads, which % kv_heads
    low, high, several = 0, q_seq, 0
    if DOCS:
        low, high, several = doc_range(lows, highs, mixed, batch, n0, k_seq, N)
    begin, inside, outside, end = query_blocks(
        n0, low, high, several, q_seq, q_offset, window, CAUSAL, WINDOWED, DOCS, M, N)  # fmt: skip
    return batch, kv_head, n0, begin, inside, outside, gl.cdiv(end - begin, M)


@gluon.jit
def _copy(
    k_desc: Pointer, v_desc: Pointer, q_desc: Pointer, g_desc: Pointer, lse_desc: Pointer, delta_desc: Pointer,
    k_buf: Tile, v_buf: Tile, q_buf: Tile, g_buf: Tile, lse_buf: Tile, delta_buf: Tile, bars: Pack,
    lows: Pointer, highs: Pointer, mixed: Pointer, numbers: Pack,
    GROUP: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr,
    M: constexpr, N: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Copy keys and values once, and queries and gradients as far ahead as there is room."""
    kv_full, q_full, g_full, empty, sum_full, sum_empty = bars
    batches, kv_heads, q_seq, k_seq, q_offset, window = numbers
    batch, kv_head, n0, begin, inside, outside, count = _work(
        lows, highs, mixed, numbers, CAUSAL, WINDOWED, DOCS, M, N)  # fmt: skip
    mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    load(k_desc, [batch, n0, kv_head, 0], kv_full.index(0), k_buf)
    load(v_desc, [batch, n0, kv_head, 0], kv_full.index(0), v_buf)
    for i in range(GROUP * count):
        s = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        head = kv_head * GROUP + i // count
        m0 = begin + i % count * M
        mbarrier.wait(empty.index(s), free)
        mbarrier.expect(q_full.index(s), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
        load(q_desc, [batch, m0, head, 0], q_full.index(s), q_buf.index(s))
        load(lse_desc, [batch * kv_heads * GROUP + head, m0], q_full.index(s), lse_buf.index(s))
        mbarrier.expect(g_full.index(s), g_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        load(g_desc, [batch, m0, head, 0], g_full.index(s), g_buf.index(s))
        load(delta_desc, [batch * kv_heads * GROUP + head, m0], g_full.index(s), delta_buf.index(s))


@gluon.jit
def _add_up(
    sum_desc: Pointer, sum_buf: Tile, bars: Pack,
    lows: Pointer, highs: Pointer, mixed: Pointer, numbers: Pack,
    GROUP: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, M: constexpr, N: constexpr,
) -> None:  # fmt: skip
    """Add each block's part of the queries' gradients to memory."""
    kv_full, q_full, g_full, empty, sum_full, sum_empty = bars
    batch, kv_head, n0, begin, inside, outside, count = _work(
        lows, highs, mixed, numbers, CAUSAL, WINDOWED, DOCS, M, N)  # fmt: skip
    for i in range(GROUP * count):
        mbarrier.wait(sum_full.index(0), i & 1)
        add(sum_desc, [batch, begin + i % count * M, kv_head * GROUP + i // count, 0], sum_buf)
        tma.store_wait(0)
        mbarrier.arrive(sum_empty.index(0))


@gluon.jit
def _weights(
    scores: Tile,  # (N, M), keys and queries
    base: Tile,  # (M,), log-sum-exps in base 2, infinite where a query sees no key and past the end
    k_docs: Tile,  # (N,)
    docs: Pointer,  # (k_seq,)
    n0: Number, m0: Number, inside: Number, outside: Number, factor: Number, numbers: Pack,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, M: constexpr, N: constexpr, LAYOUT: constexpr,
) -> Tile:  # fmt: skip
    """Return the attention's weights, zero where a query does not see a key."""
    batches, kv_heads, q_seq, k_seq, q_offset, window = numbers
    p = gl.exp2(scores * factor - base[None, :])
    if (m0 < inside) | (m0 >= outside):
        columns = n0 + gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
        rows = m0 + gl.arange(0, M, gl.SliceLayout(0, LAYOUT))
        seen = (columns < k_seq)[:, None] & (rows < q_seq)[None, :]
        if CAUSAL:
            seen = seen & (columns[:, None] <= (rows + q_offset)[None, :])
        if WINDOWED:
            seen = seen & (columns[:, None] > (rows + q_offset - window)[None, :])
        if DOCS:
            q_docs = gl.load(docs + q_offset + rows, mask=rows < q_seq, other=0)
            seen = seen & (k_docs[:, None] == q_docs[None, :])
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _block(
    i: Number, m0: Number,
    sum_k: Tile,  # (N, D), gradient of keys / scale
    sum_v: Tile,  # (N, D), gradient of values
    k_docs: Tile, no_scores: Tile, no_part: Tile, keys: Tile, values: Tile, q_buf: Tile, g_buf: Tile, lse_buf: Tile,
    delta_buf: Tile, s_buf: Tile, sum_buf: Tile, bars: Pack, docs: Pointer,
    n0: Number, inside: Number, outside: Number, factor: Number, numbers: Pack,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, M: constexpr, N: constexpr, D: constexpr,
    STAGES: constexpr, SCORES: constexpr, LEFT: constexpr,
) -> tuple[Tile, Tile]:  # fmt: skip
    """Add what the i-th block of queries contributes."""
    kv_full, q_full, g_full, empty, sum_full, sum_empty = bars
    s = i % STAGES
    phase = (i // STAGES) & 1
    queries, grads = q_buf.index(s).reshape([M, D]), g_buf.index(s).reshape([M, D])
    mbarrier.wait(q_full.index(s), phase)
    asked = warpgroup_mma(keys, queries.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    mbarrier.wait(g_full.index(s), phase)
    asked_p = warpgroup_mma(values, grads.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[asked])
    base = lse_buf.index(s).reshape([M]).load(gl.SliceLayout(0, SCORES))
    p = _weights(
        scores, base, k_docs, docs, n0, m0, inside, outside, factor, numbers, CAUSAL, WINDOWED, DOCS, M, N,
        SCORES)  # fmt: skip
    left_p = gl.convert_layout(p.to(q_buf.dtype), LEFT)
    grad_p = warpgroup_mma_wait(0, deps=[asked_p])
    running_v = warpgroup_mma(left_p, grads, sum_v, is_async=True)
    delta = delta_buf.index(s).reshape([M]).load(gl.SliceLayout(0, SCORES))
    grad_s = (p * (grad_p - delta[None, :])).to(q_buf.dtype)
    together()  # the other warps may still read the last block's
    s_buf.store(grad_s)
    fence_async_shared()
    together()
    part = warpgroup_mma(s_buf.permute((1, 0)), keys, no_part, use_acc=False, is_async=True)
    running_k = warpgroup_mma(gl.convert_layout(grad_s, LEFT), queries, sum_k, is_async=True)
    sum_v, sum_q = warpgroup_mma_wait(1, deps=[running_v, part])
    mbarrier.wait(sum_empty.index(0), (i & 1) ^ 1)
    sum_buf.reshape([M, D]).store(sum_q)
    fence_async_shared()
    mbarrier.arrive(sum_full.index(0))
    sum_k = warpgroup_mma_wait(0, deps=[running_k])
    mbarrier.arrive(empty.index(s))
    return sum_k, sum_v


@gluon.jit
def _compute(
    dk_desc: Pointer, dv_desc: Pointer,
    k_buf: Tile, v_buf: Tile, q_buf: Tile, g_buf: Tile, lse_buf: Tile, delta_buf: Tile, s_buf: Tile,
    sum_buf: Tile, bars: Pack, docs: Pointer, lows: Pointer, highs: Pointer, mixed: Pointer,
    factor: Number, scale: Number, numbers: Pack,
    GROUP: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr,
    M: constexpr, N: constexpr, D: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of the program's keys and values, and each block's part of the queries'."""
    kv_full, q_full, g_full, empty, sum_full, sum_empty = bars
    batches, kv_heads, q_seq, k_seq, q_offset, window = numbers
    # Scores are (keys, queries); the queries' gradients (queries, D), half of the columns for each group of warps.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, M, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, D // (WARPS // 4), 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    batch, kv_head, n0, begin, inside, outside, count = _work(
        lows, highs, mixed, numbers, CAUSAL, WINDOWED, DOCS, M, N)  # fmt: skip
    docs += batch * k_seq
    k_docs = gl.arange(0, N, gl.SliceLayout(1, SCORES))
    if DOCS:
        k_docs = gl.load(docs + n0 + k_docs, mask=n0 + k_docs < k_seq, other=-1)
    no_scores = gl.full([N, M], 0.0, gl.float32, SCORES)
    no_part = gl.full([M, D], 0.0, gl.float32, QUERIES)
    sum_k = gl.full([N, D], 0.0, gl.float32, KEYS)
    sum_v = gl.full([N, D], 0.0, gl.float32, KEYS)
    keys, values = k_buf.reshape([N, D]), v_buf.reshape([N, D])
    mbarrier.wait(kv_full.index(0), 0)
    for i in range(GROUP * count):
        sum_k, sum_v = _block(
            i, begin + i % count * M, sum_k, sum_v, k_docs, no_scores, no_part, keys, values, q_buf, g_buf, lse_buf,
            delta_buf, s_buf, sum_buf, bars, docs, n0, inside, outside, factor, numbers, CAUSAL, WINDOWED, DOCS, M, N,
            D, STAGES, SCORES, LEFT)  # fmt: skip
    together()
    keys.store((sum_k * scale).to(q_buf.dtype))
    values.store(sum_v.to(q_buf.dtype))
    fence_async_shared()
    together()
    store(dk_desc, [batch, n0, kv_head, 0], k_buf)
    store(dv_desc, [batch, n0, kv_head, 0], v_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batches", "kv_heads", "q_seq", "k_seq", "q_offset", "window"])
def backward_kernel(
    q_desc: Pointer,  # (batch, q_seq, heads, D), in tiles (1, M, 1, D)
    k_desc: Pointer,  # (batch, k_seq, kv_heads, D), in tiles (1, N, 1, D)
    v_desc: Pointer,  # as k_desc
    g_desc: Pointer,  # as q_desc, the output's gradient
    sum_desc: Pointer,  # as q_desc, float32, dense: gradients of queries / scale are added
    dk_desc: Pointer,  # as k_desc, dense
    dv_desc: Pointer,  # as k_desc, dense
    lse_desc: Pointer,  # (batch · heads, queries), in tiles (1, M): as `triton_backward.prepare_kernel` writes it
    delta_desc: Pointer,  # as lse_desc
    docs: Pointer,  # (batch, k_seq), if DOCS
    lows: Pointer,  # (batch, groups of DOC_BLOCK keys)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    factor: Number, scale: Number,
    batches: Number, kv_heads: Number, q_seq: Number, k_seq: Number, q_offset: Number, window: Number,
    GROUP: constexpr,  # query heads that share a key head
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr,
    M: constexpr, N: constexpr, D: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of one block of keys, over the query heads of its group in turn."""
    numbers = (batches, kv_heads, q_seq, k_seq, q_offset, window)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [1, N, 1, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [1, N, 1, D], v_desc.layout)
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, D], q_desc.layout)
    g_buf = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, M, 1, D], g_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_desc.layout)
    s_buf = gl.allocate_shared_memory(q_desc.dtype, [N, M], FLAT)
    sum_buf = gl.allocate_shared_memory(gl.float32, [1, M, 1, D], sum_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    sum_full = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    sum_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(sum_full.index(0), count=1)
    mbarrier.init(sum_empty.index(0), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
        mbarrier.init(g_full.index(s), count=1)
    fence_async_shared()
    bars = (kv_full, q_full, g_full, empty, sum_full, sum_empty)
    gl.warp_specialize([
        (_compute, (dk_desc, dv_desc, k_buf, v_buf, q_buf, g_buf, lse_buf, delta_buf, s_buf, sum_buf, bars, docs, lows,
                    highs, mixed, factor, scale, numbers, GROUP, CAUSAL, WINDOWED, DOCS, M, N, D, STAGES)),
        (_copy, (k_desc, v_desc, q_desc, g_desc, lse_desc, delta_desc, k_buf, v_buf, q_buf, g_buf, lse_buf, delta_buf,
                 bars, lows, highs, mixed, numbers, GROUP, CAUSAL, WINDOWED, DOCS, M, N, STAGES)),
        (_add_up, (sum_desc, sum_buf, bars, lows, highs, mixed, numbers, GROUP, CAUSAL, WINDOWED, DOCS, M, N)),
    ], [1, 1], [24, 24])  # fmt: skip
