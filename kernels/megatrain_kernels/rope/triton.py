"""Triton kernel of rotary position embeddings: one program rotates all heads of one position, queries and keys alike.

cos and sin are read once for all heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr


@triton.jit
def rotate_heads(
    x: Pointer,  # (heads, head_dim) of one position
    out: Pointer,  # (heads, head_dim), dense
    c: Tile,  # (1, HALF)
    s: Tile,  # (1, HALF)
    heads: Number, head_step: Number, half: Number, HEADS: constexpr, HALF: constexpr,
) -> None:  # fmt: skip
    """Rotate all heads of one position."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    known = (head < heads) & (pair < half)
    place = x + head * head_step + pair
    a = tl.load(place, mask=known, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=known, other=0.0).to(tl.float32)
    made = out + head * (2 * half) + pair
    tl.store(made, (a * c - b * s).to(out.dtype.element_ty), mask=known)
    tl.store(made + half, (b * c + a * s).to(out.dtype.element_ty), mask=known)


@triton.jit
def rotary_kernel(
    q: Pointer,  # (batch, seq, q_heads, head_dim)
    k: Pointer,  # (batch, seq, k_heads, head_dim)
    cos: Pointer,  # (batch, seq, half), or (seq, half) with table_batch 0
    sin: Pointer,  # as cos
    q_out: Pointer,  # as q, dense
    k_out: Pointer,  # as k, dense
    q_batch: Number, q_seq: Number, q_head: Number,  # strides; that of the last dimension is 1
    k_batch: Number, k_seq: Number, k_head: Number,
    table_batch: Number, table_seq: Number,
    seq: Number, q_heads: Number, k_heads: Number, half: Number,
    sign: Number,  # -1 rotates back
    Q_HEADS: constexpr, K_HEADS: constexpr, HALF: constexpr,
) -> None:  # fmt: skip
    """Rotate one position of one sequence."""
    index = tl.program_id(0).to(tl.int64)
    row, place = index // seq, index % seq
    pair = tl.arange(0, HALF)
    entry = row * table_batch + place * table_seq + pair
    c = tl.load(cos + entry, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + entry, mask=pair < half, other=0.0).to(tl.float32)[None, :] * sign
    q_from, q_to = q + row * q_batch + place * q_seq, q_out + index * q_heads * 2 * half
    rotate_heads(q_from, q_to, c, s, q_heads, q_head, half, Q_HEADS, HALF)
    k_from, k_to = k + row * k_batch + place * k_seq, k_out + index * k_heads * 2 * half
    rotate_heads(k_from, k_to, c, s, k_heads, k_head, half, K_HEADS, HALF)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Rotate q and k `(batch, seq, heads, head_dim)` by the angles of the tables, or back."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    batch, seq, heads, dim = q.shape
    made = q.new_empty(q.shape), k.new_empty(k.shape)
    if batch * seq:
        table = (cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2))
        sizes = (seq, heads, k.shape[2], dim // 2, -1.0 if back else 1.0)
        blocks = {
            "Q_HEADS": triton.next_power_of_2(heads),
            "K_HEADS": triton.next_power_of_2(k.shape[2]),
            "HALF": triton.next_power_of_2(dim // 2),
        }
        rotary_kernel[(batch * seq,)](
            q, k, cos, sin, *made, *q.stride()[:3], *k.stride()[:3], *table, *sizes, **blocks
        )
    return made
