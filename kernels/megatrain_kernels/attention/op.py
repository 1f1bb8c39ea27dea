"""Attention: picks the fastest path for the case at hand."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatrain_kernels.attention.cpu import blocked_causal_attention
from megatrain_kernels.attention.reference import allowed, attention_reference
from megatrain_kernels.backend import choose

LONGEST_BLOCKED_SEQ = 1024  # beyond this the kept probabilities cost more memory than they save time


def attention(
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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with grouped key heads (GQA, arXiv 2305.13245).

    Args:
        q: `(batch, q_seq, heads, head_dim)`.
        k, v: `(batch, k_seq, kv_heads, head_dim)` and `(batch, k_seq, kv_heads, v_dim)`; kv_heads divides heads.
        scale: factor on the scores; None: `head_dim ** -0.5`.
        window: a query sees its own position and the `window - 1` before it.
        doc_ids: `(batch, k_seq)` integers, equal inside a document; a query sees only its own document.
        softcap: c: scores become c·tanh(scores / c) (Gemma 2, arXiv 2408.00118).
        q_offset: position of the first query among the keys.
        return_lse: also return the log-sum-exp of the scores, `(batch, heads, q_seq)`, float32 at least.

    Returns:
        `(batch, q_seq, heads, v_dim)` in q's type.

    Raises:
        ValueError: kv_heads does not divide heads.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    self_attention = q.shape[1] == k.shape[1] and q_offset == 0
    if choose(backend) == "reference" or return_lse or softcap is not None or not self_attention:
        out, lse = attention_reference(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            window=window,
            doc_ids=doc_ids,
            softcap=softcap,
            q_offset=q_offset,
        )
        return (out, lse) if return_lse else out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocked = q.device.type == "cpu" and causal and q.requires_grad and q.shape[1] <= LONGEST_BLOCKED_SEQ
    if blocked and not torch.compiler.is_compiling():
        return blocked_causal_attention(q, k, v, scale=scale, window=window, doc_ids=doc_ids)
    return _fused(q, k, v, causal=causal, scale=scale, window=window, doc_ids=doc_ids)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, window: int | None, doc_ids: Tensor | None
) -> Tensor:
    """torch's own fused attention, with a mask only where one is needed."""
    mask = None
    if window is not None or doc_ids is not None:
        seq = q.shape[1]
        mask = allowed(seq, seq, causal=causal, window=window, q_offset=0, device=q.device)[None, None]
        if doc_ids is not None:
            mask = mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
