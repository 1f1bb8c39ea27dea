"""Attention's forward pass for Hopper: warps of their own copy keys and values while two groups of warps compute.

As FlashAttention-3 (arXiv 2407.08608, algorithms 1 and 2): the products of one group run while the other group computes
exponentials, and a group's product with the values of one block while it computes the exponentials of the next. A
program takes one tile of queries after another, the longest first, so that all programs end at about one time.
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

from megatrain_kernels.flash_attention.triton_hopper_names import doc_range, key_blocks, load, store
from megatrain_kernels.jit_types import Number, Pack, Pointer, Tile, constexpr

LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # queries of one group of four warps
GROUPS = gl.constexpr(2)


@gluon.jit
def _place(turn: Number, tiles: Number) -> Number:
    """Return this program's tile of a turn; every second turn goes the other way, so that long and short even out."""
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    if turn % 2 == 1:
        mine = programs - 1 - mine
    return turn * programs + mine


@gluon.jit
def _work(
    tile: Number,
    lows: Pointer,  # (batch, groups of DOC_BLOCK queries)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    numbers: Tile,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, N: constexpr,
) -> tuple[Number, ...]:  # fmt: skip
    """Return a tile's row, head and first query; its first key; and its numbers of key blocks, in the order of visits.

    Keys are visited from the last block to the first: `tail` blocks with masks, `middle` less `tail` without, and the
    rest of `count` with masks again.
    """
    batches, heads, q_seq, k_seq, q_offset, window = numbers
    pairs = batches * heads
    m0 = (gl.cdiv(q_seq, GROUPS * ROWS) - 1 - tile // pairs) * (GROUPS * ROWS)
    batch, head = tile % pairs // heads, tile % pairs % heads
    low, high, several = 0, k_seq, 0
    if DOCS:
        low, high, several = doc_range(lows, highs, mixed, batch, m0, q_seq, GROUPS * ROWS)
    begin, inside, outside, end = key_blocks(
        m0, low, high, several, k_seq, q_offset, window, CAUSAL, WINDOWED, DOCS, GROUPS * ROWS, N)  # fmt: skip
    # A tile that sees no key visits one block, all of it masked.
    count = gl.maximum(gl.cdiv(end - begin, N), 1)
    tail = gl.maximum(count - (outside - begin) // N, 1)
    middle = gl.maximum(count - gl.cdiv(inside - begin, N), tail)
    return batch, head, m0, begin, tail, middle, count


@gluon.jit
def _copy(
    q_desc: Pointer, k_desc: Pointer, v_desc: Pointer, q_buf: Tile, k_buf: Tile, v_buf: Tile,
    bars: Pack,
    lows: Pointer, highs: Pointer, mixed: Pointer, numbers: Tile,
    GROUP: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, N: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Copy queries, keys and values to shared memory, as far ahead as there is room."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    batches, heads, q_seq, k_seq, q_offset, window = numbers
    tiles = gl.cdiv(q_seq, GROUPS * ROWS) * batches * heads
    step = 0
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        tile = _place(turn, tiles)
        if tile < tiles:
            batch, head, m0, begin, tail, middle, count = _work(
                tile, lows, highs, mixed, numbers, CAUSAL, WINDOWED, DOCS, N)  # fmt: skip
            for g in gl.static_range(GROUPS):
                mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
                load(q_desc, [batch, m0 + g * ROWS, head, 0], q_full.index(g), q_buf.index(g))
            for i in range(count):
                s = step % STAGES
                phase = (step // STAGES) & 1
                at = begin + (count - 1 - i) * N
                mbarrier.wait(k_empty.index(s), phase ^ 1)
                mbarrier.expect(k_full.index(s), k_desc.block_type.nbytes)
                load(k_desc, [batch, at, head // GROUP, 0], k_full.index(s), k_buf.index(s))
                mbarrier.wait(v_empty.index(s), phase ^ 1)
                mbarrier.expect(v_full.index(s), v_desc.block_type.nbytes)
                load(v_desc, [batch, at, head // GROUP, 0], v_full.index(s), v_buf.index(s))
                step += 1


@gluon.jit
def _soften(
    scores: Tile,  # (ROWS, N)
    best: Tile,  # (ROWS,), the largest score so far, in base 2
    total: Tile,  # (ROWS,), the sum so far of exp2(score - best)
    q_docs: Tile,  # (ROWS,)
    docs: Pointer,  # (k_seq,)
    m0: Number, n0: Number, factor: Number, numbers: Tile,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, MASKED: constexpr,
    N: constexpr, LAYOUT: constexpr,
) -> tuple[Tile, Tile, Tile, Tile]:  # fmt: skip
    """Return the block's weights, the new maximum and sum, and what earlier weights shrink by."""
    batches, heads, q_seq, k_seq, q_offset, window = numbers
    if MASKED:
        rows = m0 + q_offset + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        columns = n0 + gl.arange(0, N, gl.SliceLayout(0, LAYOUT))
        seen = (columns < k_seq)[None, :] & (rows >= q_offset)[:, None]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        if WINDOWED:
            seen = seen & (columns[None, :] > rows[:, None] - window)
        if DOCS:
            k_docs = gl.load(docs + columns, mask=columns < k_seq, other=0)
            seen = seen & (q_docs[:, None] == k_docs[None, :])
        scores = gl.where(seen, scores, float("-inf"))
    new = gl.maximum(best, gl.max(scores, 1) * factor)
    pivot = new
    if MASKED:  # a row may have seen nothing yet: -inf - (-inf) would not be a number
        pivot = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(scores * factor - pivot[:, None])
    shrink = gl.exp2(best - pivot)
    return weights, new, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _step(
    i: Number, step: Number, passed: Number, weights: Tile, acc: Tile, best: Tile, total: Tile, q_docs: Tile,
    q: Tile, k_buf: Tile, v_buf: Tile, bars: Pack,
    docs: Pointer, zero: Tile, m0: Number, begin: Number, count: Number, factor: Number, numbers: Tile,
    g: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, MASKED: constexpr,
    N: constexpr, D: constexpr, STAGES: constexpr, SCORES: constexpr, OUT: constexpr,
) -> tuple[Tile, Tile, Tile, Tile]:  # fmt: skip
    """Take block i's scores while the product with the block before's values runs."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    s = step % STAGES
    mbarrier.wait(k_full.index(s), (step // STAGES) & 1)
    mbarrier.wait(turns.index(g), passed & 1)
    keys = k_buf.index(s).reshape([N, D]).permute((1, 0))
    asked = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    before = (step - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    running = warpgroup_mma(weights, v_buf.index(before).reshape([N, D]), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - g))
    scores = warpgroup_mma_wait(1, deps=[asked])
    mbarrier.arrive(k_empty.index(s))
    n0 = begin + (count - 1 - i) * N
    p, best, total, shrink = _soften(
        scores, best, total, q_docs, docs, m0, n0, factor, numbers, CAUSAL, WINDOWED, DOCS, MASKED, N,
        SCORES)  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[running])
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    return gl.convert_layout(p.to(v_buf.dtype), gl.DotOperandLayout(0, OUT, 2)), acc, best, total


@gluon.jit
def _finish(
    o_desc: Pointer, lse: Pointer, room: Tile, acc: Tile, best: Tile, total: Tile,
    batch: Number, head: Number, m0: Number, heads: Number, q_seq: Number,
    D: constexpr, SCORES: constexpr, OUT: constexpr,
) -> None:  # fmt: skip
    """Write a tile's log-sum-exp, and its output by way of the room of its queries."""
    unseen = total == 0.0
    total = gl.where(unseen, 1.0, total)
    natural = gl.where(unseen, float("-inf"), (best + gl.log2(total)) * LN2)
    rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(lse + (batch * heads + head) * q_seq + rows, natural, mask=rows < q_seq)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    room.reshape([ROWS, D]).store(acc.to(room.dtype))
    fence_async_shared()
    store(o_desc, [batch, m0, head, 0], room)
    tma.store_wait(0)


@gluon.jit
def _compute(
    o_desc: Pointer, lse: Pointer, q_buf: Tile, k_buf: Tile, v_buf: Tile, bars: Pack,
    docs: Pointer, lows: Pointer, highs: Pointer, mixed: Pointer, factor: Number, numbers: Tile,
    g: constexpr, CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr,
    N: constexpr, D: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Attend with one group's queries of each tile."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    batches, heads, q_seq, k_seq, q_offset, window = numbers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    zero = gl.full([ROWS, N], 0.0, gl.float32, SCORES)
    q = q_buf.index(g).reshape([ROWS, D])
    tiles = gl.cdiv(q_seq, GROUPS * ROWS) * batches * heads
    step, passed = 0, 0
    for turn in range(gl.cdiv(tiles, gl.num_programs(0))):
        tile = _place(turn, tiles)
        if tile < tiles:
            batch, head, first, begin, tail, middle, count = _work(
                tile, lows, highs, mixed, numbers, CAUSAL, WINDOWED, DOCS, N)  # fmt: skip
            m0 = first + g * ROWS
            rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
            row_docs, q_docs = docs + batch * k_seq, rows
            if DOCS:
                q_docs = gl.load(row_docs + q_offset + rows, mask=rows < q_seq, other=-1)
            acc = gl.full([ROWS, D], 0.0, gl.float32, OUT)
            best = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
            mbarrier.wait(q_full.index(g), turn & 1)
            s = step % STAGES
            mbarrier.wait(k_full.index(s), (step // STAGES) & 1)
            scores = warpgroup_mma(q, k_buf.index(s).reshape([N, D]).permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(k_empty.index(s))
            p, best, total, shrink = _soften(
                scores, best, total, q_docs, row_docs, m0, begin + (count - 1) * N, factor, numbers,
                CAUSAL, WINDOWED, DOCS, True, N, SCORES)  # fmt: skip
            p = gl.convert_layout(p.to(v_buf.dtype), WEIGHTS)
            step += 1
            for phase in gl.static_range(3):
                start = 1 if phase == 0 else (tail if phase == 1 else middle)
                stop = tail if phase == 0 else (middle if phase == 1 else count)
                for i in range(start, stop):
                    p, acc, best, total = _step(
                        i, step, passed, p, acc, best, total, q_docs, q, k_buf, v_buf, bars, row_docs, zero, m0,
                        begin, count, factor, numbers, g, CAUSAL, WINDOWED, DOCS, phase != 1, N, D, STAGES, SCORES,
                        OUT)  # fmt: skip
                    step += 1
                    passed += 1
            s = (step - 1) % STAGES
            mbarrier.wait(v_full.index(s), ((step - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, v_buf.index(s).reshape([N, D]), acc)
            mbarrier.arrive(v_empty.index(s))
            _finish(
                o_desc, lse, q_buf.index(g), acc, best, total, batch, head, m0, heads, q_seq, D, SCORES, OUT
            )
            mbarrier.arrive(q_empty.index(g))


@gluon.jit(do_not_specialize=["batches", "heads", "q_seq", "k_seq", "q_offset", "window"])
def forward_kernel(
    q_desc: Pointer,  # (batch, q_seq, heads, D), in tiles (1, ROWS, 1, D)
    k_desc: Pointer,  # (batch, k_seq, kv_heads, D), in tiles (1, N, 1, D)
    v_desc: Pointer,  # as k_desc
    o_desc: Pointer,  # as q_desc, dense
    lse: Pointer,  # (batch, heads, q_seq)
    docs: Pointer,  # (batch, k_seq), if DOCS
    lows: Pointer,  # (batch, groups of DOC_BLOCK queries)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    factor: Number, batches: Number, heads: Number, q_seq: Number, k_seq: Number, q_offset: Number, window: Number,
    GROUP: constexpr,  # query heads that share a key head
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr,
    N: constexpr, D: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """Attend with every tile of queries of every head: four warps for each half of a tile, and one that copies."""
    numbers = (batches, heads, q_seq, k_seq, q_offset, window)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, ROWS, 1, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, N, 1, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, N, 1, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_empty.index(g), count=1)
        mbarrier.init(turns.index(g), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    fence_async_shared()
    mbarrier.arrive(turns.index(0))
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    gl.warp_specialize([
        (_compute, (o_desc, lse, q_buf, k_buf, v_buf, bars, docs, lows, highs, mixed, factor, numbers, 0, CAUSAL,
                    WINDOWED, DOCS, N, D, STAGES)),
        (_compute, (o_desc, lse, q_buf, k_buf, v_buf, bars, docs, lows, highs, mixed, factor, numbers, 1, CAUSAL,
                    WINDOWED, DOCS, N, D, STAGES)),
        (_copy, (q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, bars, lows, highs, mixed, numbers, GROUP, CAUSAL,
                 WINDOWED, DOCS, N, STAGES)),
    ], [4, 1], [232, 40])  # fmt: skip
