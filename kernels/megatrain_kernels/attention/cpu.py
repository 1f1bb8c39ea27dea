"""Causal attention for training on a CPU: batched products over blocks of queries.

On CPUs with fast bf16 products this takes about half the time of torch's fused attention, whose backward pass is
slow there. Keys beyond a block's last query are never read. The probabilities are kept for the backward pass
(batch · heads · seq² / 2 elements), so `op.py` takes this path for short sequences only.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries; of 128, 256 and 512 the fastest at 256 to 1,024 tokens


def _mask(scores: Tensor, start: int, first_key: int, window: int | None, doc_ids: Tensor | None) -> None:
    """Put -inf in place where a query of the block may not look.

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


class BlockedCausalAttention(torch.autograd.Function):
    """Inputs `(batch, kv_heads, group, seq, dim)` for q and `(batch, kv_heads, seq, dim)` for k and v; q is scaled."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None
    ) -> Tensor:
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
    """As `attention_reference` for causal self-attention, without log-sum-exp."""
    batch, seq, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = (q * scale).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    out = BlockedCausalAttention.apply(grouped, k.transpose(1, 2), v.transpose(1, 2), window, doc_ids)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, seq, heads, v.shape[-1])
