"""Attention written out, in float32 at least, and the rule that every path of it takes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """The options of one call, as `attention` documents them, with the scale filled in."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    q_offset: int

    def keys(self, start: int, end: int, k_seq: int) -> tuple[int, int]:
        """Return the range (first, one past the last) in which all keys lie that queries `start` to `end` can see."""
        first = 0 if self.window is None else start + self.q_offset - self.window + 1
        last = end + self.q_offset if self.causal else k_seq
        first, last = (min(max(edge, 0), k_seq) for edge in (first, last))
        return first, max(first, last)

    def sees_any(self, start: int, end: int, k_seq: int) -> bool:
        """Return whether any of the queries `start` to `end` sees a key, documents aside."""
        first, last = self.keys(start, end, k_seq)
        return first < last

    def pairs(self, q_seq: int, k_seq: int) -> int:
        """Count the pairs of query and key that see each other, documents aside: the sum of `keys` over queries."""

        def edges(shift: int) -> int:
            """Sum `clamp(query + shift, 0, k_seq)` over the queries."""
            growing = range(max(0, min(q_seq, -shift)), max(0, min(q_seq, k_seq - shift)))
            full = q_seq - max(0, min(q_seq, k_seq - shift))
            return sum(growing) + len(growing) * shift + full * k_seq

        last = edges(self.q_offset + 1) if self.causal else q_seq * k_seq
        first = 0 if self.window is None else edges(self.q_offset - self.window + 1)
        return max(0, last - first)

    def sees_all(self, k_seq: int) -> bool:
        """Return whether every query sees every key, documents aside."""
        return self.window is None and (not self.causal or self.q_offset >= k_seq - 1)

    def masks(self, q_seq: int, k_seq: int) -> bool:
        """Return whether visibility takes a mask: it is neither "all keys" nor the triangle of self-attention."""
        triangle = self.causal and self.window is None and q_seq == k_seq and self.q_offset == 0
        return not (triangle or self.sees_all(k_seq))


def allowed(
    q_seq: int, k_seq: int, *, causal: bool, window: int | None, q_offset: int, device: torch.device
) -> Tensor:
    """Return the mask `(q_seq, k_seq)`, bool: whether query i, at position `i + q_offset`, may see key j."""
    q_position = torch.arange(q_seq, device=device)[:, None] + q_offset
    k_position = torch.arange(k_seq, device=device)[None, :]
    mask = torch.ones(q_seq, k_seq, dtype=torch.bool, device=device)
    if causal:
        mask &= k_position <= q_position
    if window is not None:
        mask &= k_position > q_position - window
    return mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    softcap: float | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale · q kᵀ + mask) v for each head (Vaswani et al. 2017, equation 1).

    Args:
        q: `(batch, q_seq, heads, head_dim)`. k, v: `(batch, k_seq, kv_heads, ...)`.
        doc_ids: `(batch, k_seq)` or longer. The other options are those of `attention`.

    Returns:
        The output in q's type and the log-sum-exp `(batch, heads, q_seq)` in the type of the computation. A query that
        sees no key has output 0 and log-sum-exp -inf.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    keys = k.to(compute).repeat_interleave(group, dim=2)
    values = v.to(compute).repeat_interleave(group, dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute) * scale, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = allowed(q.shape[1], k.shape[1], causal=causal, window=window, q_offset=q_offset, device=q.device)[
        None, None
    ]
    if doc_ids is not None:
        queries = doc_ids[:, q_offset : q_offset + q.shape[1]]
        mask = mask & (queries[:, None, :, None] == doc_ids[:, None, None, : k.shape[1]])
    scores = scores.masked_fill(~mask, float("-inf"))
    sees_none = ~mask.any(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(sees_none, 0.0), dim=-1, keepdim=True)
    weights = torch.exp(scores - lse)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
    return out, lse.masked_fill(sees_none, float("-inf")).squeeze(-1)
