"""Attention in PyTorch: torch's fused attention, blocks of queries for a CPU's training, and chunks for all else.

The chunks serve where torch's fused attention has no such option (soft-cap, log-sum-exp) and Triton is not at hand.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatrain_kernels.flash_attention.reference import Rule, allowed

LONGEST_BLOCKED_SEQ = 1024  # beyond this the kept probabilities cost more memory than they save time
BLOCK = 64  # queries; of 32, 64, 128 and 256 the fastest at 256 to 1,024 tokens, with windows and without
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores held at once


def torch_attention(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> Tensor:
    """Attend without soft-cap and log-sum-exp: in blocks for training on a CPU, else by torch's fused attention."""
    aligned = q.shape[1] == k.shape[1] and rule.q_offset == 0
    eager = not torch.compiler.is_compiling()
    short = aligned and q.shape[1] <= LONGEST_BLOCKED_SEQ
    if eager and q.device.type == "cpu" and rule.causal and q.requires_grad and short:
        return blocked_causal_attention(q, k, v, scale=rule.scale, window=rule.window, doc_ids=doc_ids)
    if eager and q.device.type == "cpu" and doc_ids is not None and bool((doc_ids == doc_ids[:, :1]).all()):
        doc_ids = None  # one document a row: no mask is needed, and none takes half the time
    return _fused(q, k, v, doc_ids, rule)


def _fused(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> Tensor:
    """Call torch's fused attention, with a mask only where one is needed."""
    q_seq, k_seq, offset = q.shape[1], k.shape[1], rule.q_offset
    mask = None
    if doc_ids is not None or rule.masks(q_seq, k_seq):
        mask = allowed(
            q_seq, k_seq, causal=rule.causal, window=rule.window, q_offset=offset, device=q.device
        )[None, None]
        if doc_ids is not None:
            mask = mask & (doc_ids[:, None, offset : offset + q_seq, None] == doc_ids[:, None, None, :k_seq])
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and not rule.sees_all(k_seq),
        scale=rule.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _mask(scores: Tensor, start: int, first_key: int, window: int | None, doc_ids: Tensor | None) -> None:
    """Put -inf, in place, where a query of the block may not look.

    scores: `(batch, kv_heads, group, block, keys)`; queries begin at `start`, keys at `first_key`.
    """
    block, n_keys = scores.shape[-2:]
    q_position = torch.arange(start, start + block)[:, None]
    k_position = torch.arange(first_key, first_key + n_keys)[None, :]
    if window is None:
        diagonal = start - first_key
        scores[..., diagonal:].masked_fill_((k_position > q_position)[:, diagonal:], float("-inf"))
    else:
        scores.masked_fill_((k_position > q_position) | (k_position <= q_position - window), float("-inf"))
    if doc_ids is None:
        return
    queries, keys = doc_ids[:, start : start + block], doc_ids[:, first_key : first_key + n_keys]
    for row in (keys.amin(1) != keys.amax(1)).nonzero().flatten().tolist():  # most rows hold one document
        scores[row].masked_fill_(queries[row, :, None] != keys[row, None, :], float("-inf"))


class _BlockedCausalAttention(torch.autograd.Function):
    """Causal self-attention as batched products over blocks of queries, with the probabilities kept.

    q is scaled and `(batch, kv_heads, group, seq, dim)`; k and v are `(batch, kv_heads, seq, dim)`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None
    ) -> Tensor:
        """Attend, one block of queries after the other."""
        batch, kv_heads, group, seq, dim = q.shape
        flat_k, flat_v = k.reshape(-1, seq, dim), v.reshape(batch * kv_heads, seq, -1)
        out = q.new_empty(batch, kv_heads, group, seq, v.shape[-1])
        kept: list[Tensor] = []
        for start in range(0, seq, BLOCK):
            end = min(start + BLOCK, seq)
            first_key = 0 if window is None else max(0, start - window + 1)
            queries = q[..., start:end, :].reshape(batch * kv_heads, -1, dim)
            scores = torch.bmm(queries, flat_k[:, first_key:end].transpose(1, 2))
            scores = scores.view(batch, kv_heads, group, end - start, end - first_key)
            _mask(scores, start, first_key, window, doc_ids)
            probabilities = torch.softmax(scores, dim=-1).view(batch * kv_heads, -1, end - first_key)
            mixed = torch.bmm(probabilities, flat_v[:, first_key:end])
            out[..., start:end, :] = mixed.view(batch, kv_heads, group, end - start, -1)
            kept.append(probabilities)
        ctx.save_for_backward(q, flat_k, flat_v, *kept)
        ctx.window, ctx.kv_shapes = window, (k.shape, v.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, *kept = ctx.saved_tensors
        (grad_out,) = grads
        seq, dim = q.shape[-2:]
        # Contributions of several query blocks to one key are added in float32.
        accumulate = torch.promote_types(k.dtype, torch.float32) if len(kept) > 1 else k.dtype
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=accumulate), torch.zeros_like(v, dtype=accumulate)
        for start, probabilities in zip(range(0, seq, BLOCK), kept, strict=True):
            end = min(start + BLOCK, seq)
            first_key = end - probabilities.shape[-1]
            keys, values = k[:, first_key:end], v[:, first_key:end]
            queries = q[..., start:end, :].reshape(k.shape[0], -1, dim)
            grad = grad_out[..., start:end, :].reshape(k.shape[0], -1, v.shape[-1])
            grad_v[:, first_key:end] += torch.bmm(probabilities.transpose(1, 2), grad)
            grad_p = torch.bmm(grad, values.transpose(1, 2))
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            grad_q[..., start:end, :] = torch.bmm(grad_s, keys).view_as(grad_q[..., start:end, :])
            grad_k[:, first_key:end] += torch.bmm(grad_s.transpose(1, 2), queries)
        k_shape, v_shape = ctx.kv_shapes
        return grad_q, grad_k.to(k.dtype).view(k_shape), grad_v.to(v.dtype).view(v_shape), None, None


def blocked_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, doc_ids: Tensor | None
) -> Tensor:
    """Attend causally within one sequence, for training on a CPU; there is no log-sum-exp.

    On CPUs with fast bf16 products this takes about half the time of torch's fused attention, whose backward pass is
    slow there. Keys beyond a block's last query are never read. The probabilities are kept for the backward pass
    (batch · heads · seq² / 2 elements), so only sequences up to `LONGEST_BLOCKED_SEQ` come here.
    """
    batch, seq, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = (q * scale).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    out = _BlockedCausalAttention.apply(grouped, k.transpose(1, 2), v.transpose(1, 2), window, doc_ids)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, seq, heads, v.shape[-1])


def chunk_rows(q: Tensor, k_seq: int) -> int:
    """Return the queries of one chunk, for q `(batch, q_seq, heads, head_dim)`."""
    per_row = max(1, q.shape[0] * q.shape[2] * k_seq)
    return max(1, CHUNK_ELEMENTS.get(q.device.type, 1 << 26) // per_row)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Reorder `(batch, seq, heads, dim)` to `(batch, kv_heads, group, seq, dim)`, float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unflatten(2, (kv_heads, x.shape[2] // kv_heads)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(
    q: Tensor, k: Tensor, doc_ids: Tensor | None, rule: Rule, start: int, first: int
) -> tuple[Tensor, Tensor | None]:
    """Return scores `(batch, kv_heads, group, rows, keys)`, -inf where unseen, and d(capped)/d(uncapped).

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
    """Return the output `(batch, q_seq, heads, v_dim)` in q's type and the log-sum-exp `(batch, heads, q_seq)`.

    Of any kind of call, a chunk of queries at a time, in float32 at least; the memory beyond the results is the scores
    of one chunk.
    """
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    doc_ids: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their types; scores are computed again.

    With P = exp(S - lse): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - (rowsum(dO ∘ O) - dlse)), dQ = dS K, dK = dSᵀ Q
    (FlashAttention-2, arXiv 2307.08691, algorithm 2; the term dlse since d(lse)/dS = P).
    """
    kv_heads, k_seq = k.shape[2], k.shape[1]
    rows = chunk_rows(q, k_seq)
    queries, keys, values, out, grad_out = (_grouped(t, kv_heads) for t in (q, k, v, out, grad_out))
    lse, grad_lse = (t.unflatten(1, (kv_heads, -1)).unsqueeze(-1) for t in (lse, grad_lse))
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
