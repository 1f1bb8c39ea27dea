"""What attention's forward and backward kernels share: tiles, scores, masks, and which blocks to visit.

Blocks in which no pair of query and key is visible are never loaded; in blocks in which every pair is visible no
position is compared. Scores are kept in a raw form with score · log2(e) = raw · factor, since exp2 is the GPU's own.
"""

import torch
import triton
import triton.language as tl

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr

# Tokens for which one range of visible partners is kept: divides every block size.
DOC_BLOCK = tl.constexpr(16)
# float32 products as three of tf32 each, on tensor cores: nearly exact, with a tenth of the spilled registers.
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
REDUCES = tl.constexpr(not interpreting())  # the interpreter has no additions by tensor descriptor
# Before Triton 3.9 a loop that leaves its last product in flight is compiled so that every product waits for the one
# before (ptxas' warning C7515). An instruction that reads the sum inside the loop makes Triton wait there instead.
SETTLES = tl.constexpr(
    not interpreting()
    and torch.version.hip is None
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
)


@triton.jit
def settled(total: Tile, NEEDED: constexpr) -> Tile:
    """Return `total`, float32, once the product that it comes from has ended, where that is NEEDED."""
    if SETTLES and NEEDED:
        total = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=False, pack=1
        )
    return total


@triton.jit
def source(
    base: Pointer,  # (limit, SIZE)
    limit: Number, step: Number, COUNT: constexpr, SIZE: constexpr, WIDTH: constexpr, TMA: constexpr,
) -> Pointer:  # fmt: skip
    """Return what `load_rows` reads from: a tensor descriptor, or the address itself."""
    if TMA:
        found = tl.make_tensor_descriptor(
            base, shape=[limit, SIZE], strides=[step, 1], block_shape=[COUNT, WIDTH]
        )
    else:
        found = base
    return found


@triton.jit
def load_rows(
    base: Pointer,  # (limit, SIZE), as `source` returns it
    first: Number, limit: Number,
    step: Number,  # stride of rows
    COUNT: constexpr, SIZE: constexpr, WIDTH: constexpr,
    MASKED: constexpr,  # whether rows may lie beyond the matrix
    TMA: constexpr,
) -> Tile:  # fmt: skip
    """Load a tile `(COUNT, WIDTH)` from row `first` on, with zeros beyond the matrix."""
    if TMA:
        tile = base.load([first, 0])
    else:
        rows, columns = tl.arange(0, COUNT), tl.arange(0, WIDTH)
        at = base + tl.cast(first, tl.int64) * step + rows[:, None] * step + columns[None, :]
        if MASKED:
            inside = (first + rows < limit)[:, None] & (columns < SIZE)[None, :]
            tile = tl.load(at, mask=inside, other=0.0)
        elif SIZE != WIDTH:
            tile = tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_rows(
    base: Pointer,  # (limit, SIZE)
    tile: Tile,  # (COUNT, WIDTH)
    first: Number, limit: Number,
    step: Number,  # stride of rows
    COUNT: constexpr, SIZE: constexpr, WIDTH: constexpr,
) -> None:  # fmt: skip
    """Store a tile from row `first` on; what lies beyond the matrix is dropped."""
    rows, columns = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = base + tl.cast(first, tl.int64) * step + rows[:, None] * step + columns[None, :]
    inside = (first + rows < limit)[:, None] & (columns < SIZE)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def target(
    base: Pointer,  # (limit, SIZE), float32
    limit: Number, step: Number, COUNT: constexpr, SIZE: constexpr, WIDTH: constexpr, TMA: constexpr,
) -> Pointer:  # fmt: skip
    """Return what `add_rows` adds to, as `source` does."""
    return source(base, limit, step, COUNT, SIZE, WIDTH, TMA and REDUCES)


@triton.jit
def add_rows(
    base: Pointer,  # (limit, SIZE), as `target` returns it
    tile: Tile,  # (COUNT, WIDTH), float32
    first: Number, limit: Number,
    step: Number,  # stride of rows
    COUNT: constexpr, SIZE: constexpr, WIDTH: constexpr, TMA: constexpr,
) -> None:  # fmt: skip
    """Add a tile to memory from row `first` on, beside other programs; what lies beyond the matrix is dropped."""
    if TMA and REDUCES:
        base.atomic_add([first, 0], tile)
    else:
        rows, columns = tl.arange(0, COUNT), tl.arange(0, WIDTH)
        at = base + tl.cast(first, tl.int64) * step + rows[:, None] * step + columns[None, :]
        inside = (first + rows < limit)[:, None] & (columns < SIZE)[None, :]
        tl.atomic_add(at, tile, mask=inside, sem="relaxed")


@triton.jit
def raw_scores(
    a: Tile,  # (rows, BLOCK_D)
    b: Tile,  # (columns, BLOCK_D)
    inner: Number, CAPPED: constexpr,
) -> Tile:  # fmt: skip
    """Return a bᵀ; with a soft-cap tanh(a bᵀ · scale / cap), by exp2 with inner = 2 · log2(e) · scale / cap."""
    raw = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if CAPPED:
        raw = 1.0 - 2.0 / (tl.exp2(raw * inner) + 1.0)
    return raw


@triton.jit
def visible(
    rows: Tile,  # queries, (BLOCK_M, 1) or (1, BLOCK_M)
    columns: Tile,  # keys, (1, BLOCK_N) or (BLOCK_N, 1)
    k_seq: Number, q_offset: Number, window: Number, CAUSAL: constexpr, WINDOWED: constexpr,
) -> Tile:  # fmt: skip
    """Return the mask of which queries may see which keys, as far as positions say."""
    seen = columns < k_seq
    if CAUSAL:
        seen = seen & (columns <= rows + q_offset)
    else:
        seen = seen & (rows >= 0)  # always true: gives the mask its full shape
    if WINDOWED:
        seen = seen & (columns > rows + q_offset - window)
    return seen


@triton.jit
def doc_range(
    lows: Pointer,  # (batch, blocks of DOC_BLOCK tokens)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    batch: Number, first: Number, count: Number, BLOCK: constexpr,
) -> tuple[Number, Number, Number]:  # fmt: skip
    """Return what tokens `first` to `first + BLOCK` may see of others by their documents: a range, and whether not all.

    The range has every partner that shares a document with one of the tokens. Where the third is 0, each of the tokens
    shares it with every partner in the range.
    """
    at = first // DOC_BLOCK + tl.arange(0, BLOCK // DOC_BLOCK)
    blocks = tl.cdiv(count, DOC_BLOCK)
    known = at < blocks
    at += batch * blocks
    low = tl.min(tl.load(lows + at, mask=known, other=2147483647))
    high = tl.max(tl.load(highs + at, mask=known, other=0))
    # One document has one range.
    several = (low != tl.max(tl.load(lows + at, mask=known, other=0))) | (
        high != tl.min(tl.load(highs + at, mask=known, other=2147483647))
    )
    return low, high, tl.max(tl.load(mixed + at, mask=known, other=0)) + several.to(tl.int32)


@triton.jit
def key_blocks(
    m0: Number, low: Number, high: Number, mixed: Number, k_seq: Number, q_offset: Number, window: Number,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """Return which keys queries m0 to m0 + BLOCK_M visit: begin, inner, outer, end.

    Masks matter outside inner to outer.

    `low`, `high` and `mixed` are what `doc_range` returns: documents bound them already.
    All but the end are multiples of BLOCK_N, or the end itself.
    """
    inner, outer = 0, k_seq
    if DOCS:
        inner, outer = tl.where(mixed != 0, high, low), tl.minimum(outer, high)
    if CAUSAL:
        high = tl.minimum(high, m0 + BLOCK_M + q_offset)
        outer = tl.minimum(outer, m0 + q_offset + 1)
    if WINDOWED:
        low = tl.maximum(low, m0 + q_offset - window + 1)
        inner = tl.maximum(inner, m0 + BLOCK_M + q_offset - window)
    end = tl.maximum(high, 0)
    begin = tl.minimum(low // BLOCK_N * BLOCK_N, end)
    inner = tl.minimum(tl.maximum(tl.cdiv(inner, BLOCK_N) * BLOCK_N, begin), end)
    outer = tl.minimum(tl.maximum(tl.maximum(outer, 0) // BLOCK_N * BLOCK_N, inner), end)
    return begin, inner, outer, end


@triton.jit
def query_blocks(
    n0: Number, low: Number, high: Number, mixed: Number, q_seq: Number, q_offset: Number, window: Number,
    CAUSAL: constexpr, WINDOWED: constexpr, DOCS: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """Return which queries see keys n0 to n0 + BLOCK_N, as `key_blocks` does, in multiples of BLOCK_M."""
    inner, outer = 0, q_seq
    if DOCS:
        inner, outer = tl.where(mixed != 0, high, low), tl.minimum(outer, high)
    if CAUSAL:
        low = tl.maximum(low, n0 - q_offset)
        inner = tl.maximum(inner, n0 + BLOCK_N - 1 - q_offset)
    if WINDOWED:
        high = tl.minimum(high, n0 + BLOCK_N - 1 + window - q_offset)
        outer = tl.minimum(outer, n0 + window - q_offset)
    end = tl.maximum(high, 0)
    begin = tl.minimum(low // BLOCK_M * BLOCK_M, end)
    inner = tl.minimum(tl.maximum(tl.cdiv(inner, BLOCK_M) * BLOCK_M, begin), end)
    outer = tl.minimum(tl.maximum(tl.maximum(outer, 0) // BLOCK_M * BLOCK_M, inner), end)
    return begin, inner, outer, end


@triton.jit
def doc_ranges_kernel(
    docs: Pointer,  # (batch, row)
    lows: Pointer,  # (batch, blocks of DOC_BLOCK own tokens)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    row: Number, own_first: Number, own_count: Number, other_first: Number, other_count: Number,
    GROUPS: constexpr, CHUNK: constexpr,
) -> None:  # fmt: skip
    """Find for each DOC_BLOCK of own tokens the range of others whose id lies between its least and greatest id.

    And whether some id there differs from some id of the block (1) or all are one (0). Own and other tokens are slices
    of a row. Correct for ids in any order; tight for packed rows.
    """
    per_row = tl.cdiv(own_count, DOC_BLOCK * GROUPS)
    batch, part = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    base = docs + tl.cast(batch, tl.int64) * row
    group = part * GROUPS + tl.arange(0, GROUPS)
    own = group[:, None] * DOC_BLOCK + tl.arange(0, DOC_BLOCK)[None, :]
    # Tokens past the end repeat the last one, which changes no range.
    ids = tl.load(base + own_first + tl.minimum(own, own_count - 1))
    least, greatest = tl.min(ids, 1), tl.max(ids, 1)
    low = tl.full((GROUPS,), 2147483647, tl.int32)
    high = tl.full((GROUPS,), 0, tl.int32)
    found = tl.full((GROUPS,), 0, tl.int32)
    for start in range(0, other_count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        there = tl.load(base + other_first + tl.minimum(other, other_count - 1))[None, :]
        hit = (there >= least[:, None]) & (there <= greatest[:, None]) & (other < other_count)[None, :]
        low = tl.minimum(low, tl.min(tl.where(hit, other[None, :], 2147483647), 1))
        high = tl.maximum(high, tl.max(tl.where(hit, other[None, :] + 1, 0), 1))
        found += tl.sum(hit.to(tl.int32), 1)
    groups = tl.cdiv(own_count, DOC_BLOCK)
    at = tl.cast(batch, tl.int64) * groups + group
    tl.store(lows + at, low, mask=group < groups)
    tl.store(highs + at, high, mask=group < groups)
    differs = (least != greatest) | (found != high - low)
    tl.store(mixed + at, differs.to(tl.int32), mask=group < groups)
