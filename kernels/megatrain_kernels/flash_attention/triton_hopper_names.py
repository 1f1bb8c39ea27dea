"""Gluon's names for Hopper's instructions, which changed between Triton 3.6 and 3.9; and what both kernels share."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

from megatrain_kernels.flash_attention import triton_tiles
from megatrain_kernels.jit_types import Number, Pointer, constexpr

DOC_BLOCK = gl.constexpr(triton_tiles.DOC_BLOCK.value)
key_blocks = gluon.jit(triton_tiles.key_blocks.fn)
query_blocks = gluon.jit(triton_tiles.query_blocks.fn)

if hasattr(tma, "async_load"):
    load, store, add, together = tma.async_load, tma.async_store, tma.async_atomic_add, gl.barrier
else:
    load, store, together = (
        tma.async_copy_global_to_shared,
        tma.async_copy_shared_to_global,
        gl.thread_barrier,
    )

    @_core.builtin
    def add(desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile in shared memory to what is at `coord`; 3.6 has the instruction, and no name for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = _core.ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)


@gluon.jit
def doc_range(
    lows: Pointer,  # (batch, groups of DOC_BLOCK tokens)
    highs: Pointer,  # as lows
    mixed: Pointer,  # as lows
    batch: Number, first: Number, count: Number, BLOCK: constexpr,
) -> tuple[Number, Number, Number]:  # fmt: skip
    """Return what `triton_tiles.doc_range` does, from scalars."""
    groups = gl.cdiv(count, DOC_BLOCK)
    low, high, several = 2147483647, 0, 0
    other_low, other_high = 0, 2147483647
    for part in gl.static_range(BLOCK // DOC_BLOCK):
        group = gl.minimum(first // DOC_BLOCK + part, groups - 1)
        at = batch * groups + group
        one_low, one_high = gl.load(lows + at), gl.load(highs + at)
        low, other_low = gl.minimum(low, one_low), gl.maximum(other_low, one_low)
        high, other_high = gl.maximum(high, one_high), gl.minimum(other_high, one_high)
        several = gl.maximum(several, gl.load(mixed + at))
    if low != other_low:
        several = 1
    if high != other_high:
        several = 1
    return low, high, several
