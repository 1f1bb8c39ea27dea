"""Attention with output and log-sum-exp, both differentiable: the public function and its PyTorch operators."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.backend import cuda_capability
from megatrain_kernels.flash_attention.cases import SUITE
from megatrain_kernels.flash_attention.choices import fastest
from megatrain_kernels.flash_attention.reference import Rule, attention_reference
from megatrain_kernels.flash_attention.torch import chunked_backward, chunked_forward, torch_attention
from megatrain_kernels.kernel import (
    Kernel,
    autocast_dtype,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)

LARGEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
"""By type that the kernels take; wider float32 heads would spill more registers than they save memory."""


@torch.library.custom_op("megatrain::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_ids: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    q_offset: int,
    path: str,
) -> tuple[Tensor, Tensor]:
    """Return output `(batch, q_seq, heads, v_dim)` and log-sum-exp `(batch, heads, q_seq)` of `attention`."""
    rule = Rule(causal, scale, window, softcap, q_offset)
    made: tuple[Tensor, Tensor] | None = run_triton(
        ATTENTION, path, "attention_forward", q, k, v, doc_ids, rule, kind=_kind(q, v, rule)
    )
    if made is None:
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            return chunked_forward(q, k, v, doc_ids, rule)
    return made


@attention_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_seq, heads = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, q_seq, heads, v.shape[3]), q.new_empty(batch, heads, q_seq, dtype=wide)


@torch.library.custom_op("megatrain::attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    doc_ids: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    q_offset: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the same bits every time, unless the path is one of `choices.VARYING`."""
    rule = Rule(causal, scale, window, softcap, q_offset)
    args = (q, k, v, out, lse, grad_out, grad_lse, doc_ids, rule)
    made: tuple[Tensor, Tensor, Tensor] | None = run_triton(
        ATTENTION, path, "attention_backward", *args, kind=_kind(q, v, rule)
    )
    if made is None:
        with torch.autocast(q.device.type, enabled=False):
            return chunked_backward(*args)
    return made


def _kind(q: Tensor, v: Tensor, rule: Rule) -> tuple[Any, ...]:
    return q.dtype, q.shape[-1], v.shape[-1], rule.causal, rule.window is None, rule.softcap is None


@attention_backward_op.register_fake
def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, doc_ids, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, doc_ids)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, doc_ids = ctx.saved_tensors
    grads = attention_backward_op(*tensors, grad_out, grad_lse, doc_ids, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


attention_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.megatrain.attention)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count q kᵀ and p v over all pairs, whatever the mask, as torch counts its own attention."""
    return int(2 * q[0] * q[2] * q[1] * k[1] * (q[3] + v[3]))


@register_flop_formula(torch.ops.megatrain.attention_backward)
def _backward_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count scores again, dQ and dK; dP and dV."""
    return int(2 * q[0] * q[2] * q[1] * k[1] * (3 * q[3] + 2 * v[3]))


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
    """Attend with grouped key heads (GQA, arXiv 2305.13245).

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
        backend: "auto" takes the fastest that was measured on a GPU of this kind (`choices.json`); where nothing was,
            torch's fused attention if it needs no mask, and "triton" on a GPU elsewhere. "triton": the same bits every
            time. "triton_fused": five products in the backward pass for seven, and last bits that vary;
            "triton_hopper": the same by warps that specialize, for heads of 64 and 128 on that kind of GPU.

    Returns:
        `(batch, q_seq, heads, v_dim)` in q's type, [log-sum-exp]. A query that sees no key: 0 and -inf.

    Raises:
        ValueError: shapes, types, devices or options that do not fit, or no backend of that name.
    """
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    _check(q, k, v, doc_ids)
    rule = Rule(causal, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, q_offset)
    _check_options(q, doc_ids, rule)
    fusable = softcap is None and not return_lse  # what torch's fused attention offers
    path = select(ATTENTION, backend, q, k, v, doc_ids, rule, fusable)
    if path == "torch" and fusable:
        return torch_attention(q, k, v, doc_ids, rule)
    if path == "reference":
        out, lse = attention_reference(q, k, v, doc_ids=doc_ids, **rule._asdict())
    else:
        out, lse = attention_op(q, k, v, doc_ids, *rule, path)
    return (out, lse) if return_lse else out


def _autocast(x: Tensor) -> Tensor:
    """Return x in the type that autocast asks for; float64 stays."""
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> None:
    given = {"q": q, "k": k, "v": v}
    sizes = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3] > 0
        and k.shape[:3] == v.shape[:3]
    )
    rule = "q must be (batch, q_seq, heads, head_dim), k (batch, k_seq, kv_heads, head_dim) and v as k but for v_dim"
    require(sizes, rule, **given)
    divide = k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    require(divide, f"the {k.shape[2]} key heads must divide the {q.shape[2]} query heads", q=q, k=k)
    require_floating(**given)
    require(q.dtype == k.dtype == v.dtype, "q, k and v must have one type", **given)
    require_one_device(**given, doc_ids=doc_ids)
    if doc_ids is not None:
        whole = not (doc_ids.is_floating_point() or doc_ids.is_complex() or doc_ids.dtype == torch.bool)
        fits = doc_ids.ndim == 2 and doc_ids.shape[0] == k.shape[0] and doc_ids.shape[1] >= k.shape[1]
        keys = tuple(k.shape[:2])
        require(whole and fits, f"doc_ids must be integers {keys}, as the keys, or longer", doc_ids=doc_ids)


def _check_options(q: Tensor, doc_ids: Tensor | None, rule: Rule) -> None:
    if rule.window is not None and rule.window < 1:
        raise ValueError(f"window={rule.window}: a query sees itself at least, so 1 or more")
    if rule.softcap is not None and rule.softcap <= 0:
        raise ValueError(f"softcap={rule.softcap}: must be positive, or None")
    if doc_ids is not None and not 0 <= rule.q_offset <= doc_ids.shape[1] - q.shape[1]:
        raise ValueError(
            f"q_offset={rule.q_offset}: the {q.shape[1]} queries must lie among the keys, or where doc_ids reach"
        )


def _unsupported(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule, fusable: bool
) -> str | None:
    reason, widest = wrong_dtype(q), max(q.shape[-1], v.shape[-1])
    if reason is not None:
        return reason
    if widest > LARGEST_HEAD[q.dtype]:
        return f"head sizes up to {LARGEST_HEAD[q.dtype]} in {q.dtype}; got {widest}"
    if rule.scale <= 0:
        return f"a positive scale; got {rule.scale}"
    if doc_ids is not None and doc_ids.shape[1] > k.shape[1]:
        # The kernels find queries' documents among those of the keys only.
        return f"doc_ids of the {k.shape[1]} keys alone; got {tuple(doc_ids.shape)}"
    return None


def _torch_is_faster(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule, fusable: bool
) -> bool:
    if not fusable or doc_ids is not None or rule.masks(q.shape[1], k.shape[1]):
        return False
    return fastest(q, k, v, doc_ids, rule)[:1] in ([], ["torch"])


def _variant(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule, fusable: bool) -> str:
    """Return the fastest of the Triton backends that take the call."""
    call = (q, k, v, doc_ids, rule, fusable)
    for name in fastest(q, k, v, doc_ids, rule):
        if name.startswith("triton") and VARIANT_NEEDS.get(name, _unsupported)(*call) is None:
            return name
    return "triton"


def _hopper_needs(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, rule: Rule, fusable: bool
) -> str | None:
    if q.is_cuda and cuda_capability(q.device.index or 0)[0] != 9:
        return f"a Hopper GPU; got {torch.cuda.get_device_name(q.device)}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16; got {q.dtype}"
    if q.shape[-1] not in (64, 128) or v.shape[-1] != q.shape[-1]:
        return f"heads of 64 or 128; got {q.shape[-1]} and {v.shape[-1]}"
    if rule.softcap is not None:
        return "no soft-cap"
    return None if k.numel() else "keys; got none"


VARIANT_NEEDS = {"triton_hopper": _hopper_needs}

ATTENTION = register(
    Kernel(
        function=attention,
        reference=attention_reference,
        suite=SUITE,
        unsupported=_unsupported,
        backends=("reference", "torch", "triton", "triton_fused", "triton_hopper"),
        torch_is_faster=_torch_is_faster,
        variant=_variant,
        variant_needs=VARIANT_NEEDS,
    )
)
