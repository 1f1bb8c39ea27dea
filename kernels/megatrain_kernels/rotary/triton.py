"""Rotary positions of queries and keys in one launch: a program turns all heads of one position.

cos and sin are read once for all heads. In signatures T is a tile, pointer or number at run time.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr
from triton.language import tensor as T


@triton.jit
def turn_heads(
    x: T, out: T, c: T, s: T, heads: T, head_step: T, half: T, HEADS: constexpr, HALF: constexpr,
) -> None:  # fmt: skip
    """All heads of one position; `out` is dense."""
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
    q: T, k: T, cos: T, sin: T, q_out: T, k_out: T,
    q_batch: T, q_seq: T, q_head: T, k_batch: T, k_seq: T, k_head: T, table_batch: T, table_seq: T, seq: T,
    q_heads: T, k_heads: T, half: T, sign: T,
    Q_HEADS: constexpr, K_HEADS: constexpr, HALF: constexpr,
) -> None:  # fmt: skip
    """One position of one sequence; sign -1 turns back. All steps but the last dimension's, which is 1."""
    index = tl.program_id(0).to(tl.int64)
    row, place = index // seq, index % seq
    pair = tl.arange(0, HALF)
    entry = row * table_batch + place * table_seq + pair
    c = tl.load(cos + entry, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + entry, mask=pair < half, other=0.0).to(tl.float32)[None, :] * sign
    q_from, q_to = q + row * q_batch + place * q_seq, q_out + index * q_heads * 2 * half
    turn_heads(q_from, q_to, c, s, q_heads, q_head, half, Q_HEADS, HALF)
    k_from, k_to = k + row * k_batch + place * k_seq, k_out + index * k_heads * 2 * half
    turn_heads(k_from, k_to, c, s, k_heads, k_head, half, K_HEADS, HALF)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """q and k `(batch, seq, heads, head_dim)` turned by the angles of the tables, or back."""
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
