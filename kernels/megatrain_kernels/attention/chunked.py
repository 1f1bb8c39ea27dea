"""Attention of any kind in plain PyTorch, a block of queries at a time; the backward pass scores again.

It serves where torch's fused attention has no such option (soft-cap, log-sum-exp) and where Triton is not at hand.
Computes in float32 at least. Memory beyond the results: the scores of one block.
"""

import torch
from torch import Tensor

from megatrain_kernels.attention.reference import allowed
from megatrain_kernels.attention.rule import Rule

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores held at once


def chunk_rows(q: Tensor, k_seq: int) -> int:
    """Queries of one block, for q `(batch, q_seq, heads, head_dim)`."""
    per_row = max(1, q.shape[0] * q.shape[2] * k_seq)
    return max(1, CHUNK_ELEMENTS.get(q.device.type, 1 << 26) // per_row)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`(batch, seq, heads, dim)` to `(batch, kv_heads, group, seq, dim)`, float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unflatten(2, (kv_heads, x.shape[2] // kv_heads)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(
    q: Tensor, k: Tensor, doc_ids: Tensor | None, rule: Rule, start: int, first: int
) -> tuple[Tensor, Tensor | None]:
    """Scores `(batch, kv_heads, group, rows, keys)`, -inf where unseen, and d(capped)/d(uncapped).

    q `(batch, kv_heads, group, rows, dim)` begins at query `start`, k `(batch, kv_heads, 1, keys, dim)` at key `first`.
    """
    scores = (q * rule.scale) @ k.transpose(-1, -2)
    slope = None
    if rule.softcap is not None:
        bent = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * bent, 1 - bent.square()
    rows, keys = scores.shape[-2:]
    offset = start + rule.q_offset - first
    mask = allowed(rows, keys, causal=rule.causal, window=rule.window, q_offset=offset, device=q.device)
    if doc_ids is not None:
        at = start + rule.q_offset
        same = doc_ids[:, at : at + rows, None] == doc_ids[:, None, first : first + keys]
        mask = (mask & same)[:, None, None]
    return scores.masked_fill_(~mask, float("-inf")), slope


def chunked_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output `(batch, q_seq, heads, v_dim)` in q's type and log-sum-exp `(batch, heads, q_seq)`."""
    batch, q_seq, heads, _ = q.shape
    kv_heads, rows = k.shape[2], chunk_rows(q, k.shape[1])
    queries, keys, values = (_grouped(t, kv_heads) for t in (q, k, v))
    out = torch.empty(batch, q_seq, heads, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_seq, dtype=queries.dtype, device=q.device)
    for start in range(0, q_seq, rows):
        end = min(start + rows, q_seq)
        first, last = rule.keys(start, end, k.shape[1])
        scores, _ = _scores(queries[..., start:end, :], keys[..., first:last, :], doc_ids, rule, start, first)
        part = torch.logsumexp(scores, dim=-1, keepdim=True)
        # A query that sees no key has log-sum-exp -inf and output 0.
        weights = scores.sub_(part.masked_fill(part.isneginf(), 0.0)).exp_()
        out[:, start:end] = _ungrouped(weights @ values[..., first:last, :])
        lse[..., start:end] = part.squeeze(-1).flatten(1, 2)
    return out, lse


def chunked_backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    doc_ids: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their types.

    With P = exp(S - lse): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - (rowsum(dO ∘ O) - dlse)), dQ = dS K, dK = dSᵀ Q
    (FlashAttention-2, arXiv 2307.08691, algorithm 2; the term dlse since d(lse)/dS = P).
    """
    q, k, v = inputs
    kv_heads, k_seq = k.shape[2], k.shape[1]
    rows = chunk_rows(q, k_seq)
    queries, keys, values, out, grad_out = (_grouped(t, kv_heads) for t in (q, k, v, outputs[0], grads[0]))
    lse, grad_lse = (t.unflatten(1, (kv_heads, -1)).unsqueeze(-1) for t in (outputs[1], grads[1]))
    lse = lse.masked_fill(lse.isneginf(), float("inf"))  # makes P zero in rows that see no key
    delta = (out * grad_out).sum(-1, keepdim=True) - grad_lse
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.shape[1], rows):
        part = slice(start, min(start + rows, q.shape[1]))
        first, last = rule.keys(part.start, part.stop, k_seq)
        seen = slice(first, last)
        scores, slope = _scores(queries[..., part, :], keys[..., seen, :], doc_ids, rule, start, first)
        p = scores.sub_(lse[..., part, :]).exp_()
        grad_v[..., seen, :] += (p.transpose(-1, -2) @ grad_out[..., part, :]).sum(2, keepdim=True)
        grad_s = (grad_out[..., part, :] @ values[..., seen, :].transpose(-1, -2)).sub_(delta[..., part, :])
        grad_s = grad_s.mul_(p).mul_(rule.scale)
        if slope is not None:
            grad_s.mul_(slope)
        grad_q[:, part] = _ungrouped(grad_s @ keys[..., seen, :])
        grad_k[..., seen, :] += (grad_s.transpose(-1, -2) @ queries[..., part, :]).sum(2, keepdim=True)
    return grad_q, _ungrouped(grad_k).to(k.dtype).contiguous(), _ungrouped(grad_v).to(v.dtype).contiguous()
