"""RMSNorm and LayerNorm in PyTorch: torch's own functions, and blocks of rows where those are slow or inexact."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatrain_kernels.blocks import block_rows

FEW_ELEMENTS = 1 << 14
"""Up to so many, as while a text is generated, the calls cost more than the arithmetic; torch's own makes fewer."""


class _BlockedRMSNorm(torch.autograd.Function):
    """RMSNorm for CPUs, where torch's own composition takes 2 to 9 times as long; keeps x and 1/rms only.

    x `(rows, size)`. Float32 at least inside; the weight's gradient is summed over rows in that type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize each row of x."""
        compute, rows = torch.promote_types(x.dtype, torch.float32), block_rows(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(x.shape[0], 1, dtype=compute, device=x.device)
        wide_weight = weight.to(compute)
        for part, result, scale in zip(x.split(rows), out.split(rows), inverse.split(rows), strict=True):
            wide = part.to(compute)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale.copy_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_())
            if compute == x.dtype:
                torch.mul(wide, scale, out=result).mul_(wide_weight)
            else:
                result.copy_(wide.mul_(scale).mul_(wide_weight))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dx = (g - n · mean(g · n)) / rms and dweight = sum of grad · n, with n = x/rms, g = grad · weight."""
        x, weight, inverse = ctx.saved_tensors
        compute, rows = inverse.dtype, block_rows(x)
        wide_weight = weight.to(compute)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(wide_weight)
        pieces = (t.split(rows) for t in (x, grad, grad_x, inverse))
        for part, part_grad, result, scale in zip(*pieces, strict=True):
            normed = part.to(compute) * scale
            wide_grad = part_grad.to(compute)
            product = wide_grad * normed
            grad_weight += product.sum(0)
            mean = (product @ wide_weight).div_(-x.shape[-1]).unsqueeze_(1)
            inner = torch.mul(wide_grad, wide_weight, out=product).addcmul_(normed, mean)
            if compute == x.dtype:
                torch.mul(inner, scale, out=result)
            else:
                result.copy_(inner.mul_(scale))
        return grad_x, grad_weight.to(weight.dtype), None


class _HalfLayerNorm(torch.autograd.Function):
    """LayerNorm for bf16 and fp16 on a CPU, where torch sums the gradients of weight and bias in that type.

    Over 4,096 rows torch's were off by 4 to 10 %; these are summed in float32. x `(rows, size)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Normalize each row of x."""
        # With a float32 weight torch keeps mean and 1/deviation in float32 too.
        wide_bias = None if bias is None else bias.float()
        out, mean, inverse = torch.native_layer_norm(x, weight.shape, weight.float(), wide_bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Take x's gradient from torch, and sum those of weight and bias block by block."""
        x, weight, bias, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, inverse, weight.float(), None, [True, False, False]
        )
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(grad_weight)
        rows = block_rows(x)
        pieces = (t.split(rows) for t in (x, grad, mean, inverse))
        for part, part_grad, centre, scale in zip(*pieces, strict=True):
            wide_grad = part_grad.float()
            grad_bias += wide_grad.sum(0)
            grad_weight += part.float().sub_(centre).mul_(scale).mul_(wide_grad).sum(0)
        return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize over the last dimension of x `(..., size)` by the fastest way in PyTorch."""
    few = x.numel() <= FEW_ELEMENTS and not torch.is_grad_enabled()
    if few or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _BlockedRMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize over the last dimension of x `(..., size)` by torch, or where its gradients are inexact by blocks."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if half and x.device.type == "cpu" and weight.requires_grad:
        return _HalfLayerNorm.apply(x.reshape(-1, x.shape[-1]), weight, bias, eps).view(x.shape)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def plain_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `triton.normalize` returns, for where its kernel does not compile."""
    total = x.new_empty(0) if residual is None else x + residual
    wide = (x if residual is None else total).float()
    mean = wide.mean(-1) if centered else wide.new_empty(0)
    wide = wide - mean.unsqueeze(-1) if centered else wide
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    out = wide * inverse.unsqueeze(-1) * weight.float()
    return (out if bias is None else out + bias.float()).to(x.dtype), total, mean, inverse


def plain_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `triton.gradients` returns, for where its kernel does not compile."""
    centered, scale, wide = mean.numel() > 0, inverse.unsqueeze(-1), grad.float()
    normed = (x.float() - mean.unsqueeze(-1) if centered else x.float()) * scale
    inner = wide * weight.float()
    made = inner - normed * (inner * normed).mean(-1, keepdim=True)
    made = (made - inner.mean(-1, keepdim=True) if centered else made) * scale
    made = made if grad_total is None else made + grad_total.float()
    for_bias = wide.sum(0) if biased else wide.new_empty(0)
    return made.to(x.dtype), (wide * normed).sum(0).to(weight.dtype), for_bias.to(weight.dtype)
