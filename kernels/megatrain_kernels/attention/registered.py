"""Attention as a PyTorch operator with output and log-sum-exp, both differentiable: Triton, or plain PyTorch.

The operator is opaque to torch.compile and knows its shapes without data. `flops.py` tells torch its FLOPs.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.attention.chunked import chunked_backward, chunked_forward
from megatrain_kernels.attention.rule import Rule
from megatrain_kernels.backend import interpreting, triton_runs_on, try_triton

LARGEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
"""By type that the kernels take; wider float32 heads would spill more registers than they save memory."""


def takes_triton(q: Tensor, v: Tensor, scale: float, *, compiled: bool = False) -> bool:
    """Can the kernels take these inputs? `compiled`: the interpreter does not count."""
    here = triton_runs_on(q) or (not compiled and q.device.type == "cpu" and interpreting())
    return here and scale > 0 and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD.get(q.dtype, 0)


def _run(name: str, backend: str, q: Tensor, v: Tensor, rule: Rule, *args: Any) -> Any:
    """`name` of the Triton module, or None where the PyTorch path must do its work."""
    tried = takes_triton(q, v, rule.scale, compiled=backend != "triton")
    if backend == "torch" or not tried:
        return None
    # By name: the module needs triton, which a CPU machine may lack.
    launch = getattr(import_module("megatrain_kernels.attention.triton"), name)
    options = (rule.causal, rule.window is None, rule.softcap is None)
    kind = ("attention", name, q.dtype, q.shape[-1], v.shape[-1], *options)
    return try_triton(kind, partial(launch, *args, rule), backend=backend)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output `(batch, q_seq, heads, v_dim)` and log-sum-exp `(batch, heads, q_seq)` of `attention`."""
    rule = Rule(causal, scale, window, softcap, q_offset)
    result = _run("attention_forward", backend, q, v, rule, q, k, v, doc_ids)
    if result is None:
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            result = chunked_forward(q, k, v, doc_ids, rule)
    return result


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the same bits every time."""
    rule = Rule(causal, scale, window, softcap, q_offset)
    tensors = ((q, k, v), (out, lse), (grad_out, grad_lse), doc_ids)
    result = _run("attention_backward", backend, q, v, rule, *tensors)
    if result is None:
        with torch.autocast(q.device.type, enabled=False):
            result = chunked_backward(*tensors, rule)
    return result


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
