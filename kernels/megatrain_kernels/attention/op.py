"""Attention: picks the fastest path for the case at hand."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatrain_kernels.attention.cpu import blocked_causal_attention
from megatrain_kernels.attention.reference import allowed, attention_reference
from megatrain_kernels.attention.registered import attention_op, takes_triton
from megatrain_kernels.attention.rule import Rule
from megatrain_kernels.backend import choose, preferred

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
        window: a query sees its own position and the `window - 1` before it (and, unless causal, all after it).
        doc_ids: `(batch, k_seq)` integers, equal inside a document; a query sees only its own document. Or of more
            positions, so that queries can lie behind the keys.
        softcap: c: scores become c·tanh(scores / c) (Gemma 2, arXiv 2408.00118).
        q_offset: position of the first query among the keys; with `doc_ids` inside these.
        return_lse: also return the log-sum-exp of the scores, `(batch, heads, q_seq)`, float32 at least.
        backend: "auto" takes torch's fused attention where it needs no mask, and Triton on a GPU elsewhere.

    Returns:
        `(batch, q_seq, heads, v_dim)` in q's type, [log-sum-exp]. A query that sees no key: 0 and -inf.

    Raises:
        ValueError: sizes or options that do not fit each other, or a backend that cannot take them.
    """
    device = q.device.type
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    rule = Rule(causal, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, q_offset)
    _check(q, k, v, doc_ids, rule)
    backend = preferred(backend)
    chosen = choose(backend, ("torch", "triton", "reference"))
    if chosen == "reference":
        out, lse = attention_reference(q, k, v, doc_ids=doc_ids, **rule._asdict())
        return (out, lse) if return_lse else out
    longer = doc_ids is not None and doc_ids.shape[1] > k.shape[1]
    if chosen == "triton" and (longer or not takes_triton(q, v, rule.scale)):
        raise ValueError(
            "backend='triton' needs a CUDA device, float16 or bfloat16 with head sizes up to 256 or float32 up to "
            f"128, a positive scale, doc_ids of the keys; got {device}, {q.dtype}, {q.shape[-1]}, {v.shape[-1]}, "
            f"{rule.scale}, {doc_ids if doc_ids is None else tuple(doc_ids.shape)}"
        )
    plain = softcap is None and not return_lse
    masked = doc_ids is not None or rule.masks(q.shape[1], k.shape[1])
    fused = backend == "torch" or not masked or not takes_triton(q, v, rule.scale, compiled=True)
    if chosen == "torch" and plain and fused:
        return _plain(q, k, v, doc_ids, rule)
    # The kernels find queries' documents among those of the keys only.
    out, lse = attention_op(q, k, v, doc_ids, *rule, "torch" if longer else backend)
    return (out, lse) if return_lse else out


def _autocast(x: Tensor) -> Tensor:
    """x in the type that autocast asks for; float64 stays."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if on and x.dtype != torch.float64 else x


def doc_ids_from_cu_seqlens(cu_seqlens: Tensor, seq: int) -> Tensor:
    """Document ids `(1, seq)` of a packed row from cumulative lengths `(documents + 1,)`, first 0, last at most seq.

    Positions past the last length make a document of their own. Nothing is copied to the host.
    """
    positions = torch.arange(seq, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True).unsqueeze(0)


def _check(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one type; got {q.dtype}, {k.dtype}, {v.dtype}")
    if rule.window is not None and rule.window < 1:
        raise ValueError(f"window={rule.window}: a query sees itself at least, so 1 or more")
    if rule.softcap is not None and rule.softcap <= 0:
        raise ValueError(f"softcap={rule.softcap}: must be positive, or None")
    if doc_ids is None:
        return
    if doc_ids.shape[0] != k.shape[0] or doc_ids.shape[1] < k.shape[1]:
        raise ValueError(
            f"doc_ids {tuple(doc_ids.shape)}: must be {tuple(k.shape[:2])}, as the keys, or longer"
        )
    if not 0 <= rule.q_offset <= doc_ids.shape[1] - q.shape[1]:
        raise ValueError(
            f"q_offset={rule.q_offset}: the {q.shape[1]} queries must lie among the keys, or where doc_ids reach"
        )


def _plain(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> Tensor:
    """Without soft-cap and log-sum-exp: blocks of queries in training on a CPU, else torch's fused attention."""
    aligned = q.shape[1] == k.shape[1] and rule.q_offset == 0
    eager = not torch.compiler.is_compiling()
    short = aligned and q.shape[1] <= LONGEST_BLOCKED_SEQ
    if eager and q.device.type == "cpu" and rule.causal and q.requires_grad and short:
        return blocked_causal_attention(q, k, v, scale=rule.scale, window=rule.window, doc_ids=doc_ids)
    if eager and q.device.type == "cpu" and doc_ids is not None and bool((doc_ids == doc_ids[:, :1]).all()):
        doc_ids = None  # one document a row: no mask is needed, and none is half as dear
    return _fused(q, k, v, doc_ids, rule)


def _fused(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule) -> Tensor:
    """torch's own fused attention, with a mask only where one is needed."""
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
