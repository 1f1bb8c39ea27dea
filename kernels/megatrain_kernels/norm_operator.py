"""RMSNorm and LayerNorm as PyTorch operators over Triton's kernels, or plain PyTorch where they do not compile.

The operators are opaque to torch.compile and know their shapes without data.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.backend import try_triton

LARGEST_ROW = 16384
"""Elements of a row that registers hold; longer ones take the PyTorch path."""


@torch.library.custom_op("megatrain::norm", mutates_args=())
def norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_rows.Normed` of x and residual `(rows, size)`; centered: LayerNorm."""
    # By name: the module needs triton, which a CPU machine may lack.
    launch = import_module("megatrain_kernels.norm_rows").normalize
    call = partial(launch, x, residual, weight, bias, eps, centered=centered)
    kind = ("norm", "forward", x.dtype, x.shape[-1], centered)
    made: tuple[Tensor, ...] | None = try_triton(kind, call, backend=backend)
    out, total, mean, inverse = _plain(x, residual, weight, bias, eps, centered) if made is None else made
    return out, total, mean, inverse


def _plain(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else x + residual
    wide = (x if residual is None else total).float()
    mean = wide.mean(-1) if centered else wide.new_empty(0)
    wide = wide - mean.unsqueeze(-1) if centered else wide
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    out = wide * inverse.unsqueeze(-1) * weight.float()
    return (out if bias is None else out + bias.float()).to(x.dtype), total, mean, inverse


@norm_op.register_fake
def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, centered, _ = args
    stats = (x.shape[0] if centered else 0, x.shape[0])
    mean, inverse = (x.new_empty(rows, dtype=torch.float32) for rows in stats)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, inverse


@torch.library.custom_op("megatrain::norm_backward", mutates_args=())
def norm_backward_op(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    biased: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; x is what was normalised. LayerNorm, if there are means."""
    centered = mean.numel() > 0
    launch = import_module("megatrain_kernels.norm_rows").gradients
    call = partial(launch, grad, grad_total, x, weight, (mean, inverse), centered=centered, biased=biased)
    kind = ("norm", "backward", x.dtype, x.shape[-1], centered)
    made: tuple[Tensor, ...] | None = try_triton(kind, call, backend=backend)
    if made is None:
        made = _plain_backward(grad, grad_total, x, weight, mean, inverse, biased)
    for_x, for_weight, for_bias = made
    return for_x, for_weight, for_bias


def _plain_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    centered, scale, wide = mean.numel() > 0, inverse.unsqueeze(-1), grad.float()
    normed = (x.float() - mean.unsqueeze(-1) if centered else x.float()) * scale
    inner = wide * weight.float()
    made = inner - normed * (inner * normed).mean(-1, keepdim=True)
    made = (made - inner.mean(-1, keepdim=True) if centered else made) * scale
    made = made if grad_total is None else made + grad_total.float()
    for_bias = wide.sum(0) if biased else wide.new_empty(0)
    return made.to(x.dtype), (wide * normed).sum(0).to(weight.dtype), for_bias.to(weight.dtype)


@norm_backward_op.register_fake
def _fake_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, biased, _ = args
    bias_shape = weight.shape if biased else 0
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(bias_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, ctx.backend = inputs
    _, total, mean, inverse = output
    ctx.added, ctx.biased = residual is not None, bias is not None
    ctx.save_for_backward(total if ctx.added else x, weight, mean, inverse)


def _differentiate(ctx: Any, grad: Tensor, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    made = norm_backward_op(
        grad, grad_total if ctx.added else None, *ctx.saved_tensors, ctx.biased, ctx.backend
    )
    for_x, for_weight, for_bias = made
    # Two results may not be one tensor; x and residual have the same gradient.
    for_residual = for_x.clone() if ctx.added else None
    return for_x, for_residual, for_weight, for_bias if ctx.biased else None, None, None, None


norm_op.register_autograd(_differentiate, setup_context=_setup_context)
