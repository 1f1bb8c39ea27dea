"""Attention written out: the definition, in float32 at least."""

import torch
from torch import Tensor


def allowed(
    q_seq: int, k_seq: int, *, causal: bool, window: int | None, q_offset: int, device: torch.device
) -> Tensor:
    """`(q_seq, k_seq)` bool: may query i, at position `i + q_offset`, see key j?"""
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
    """softmax(scale · q kᵀ + mask) v for each head (Vaswani et al. 2017, equation 1).

    Shapes: q `(batch, q_seq, heads, head_dim)`, k and v `(batch, k_seq, kv_heads, ...)`, doc_ids `(batch, k_seq)`
    or longer.
    Returns the output in q's type and the log-sum-exp `(batch, heads, q_seq)` in the type of the computation. A
    query that sees no key has output 0 and log-sum-exp -inf.
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
