"""RMSNorm, with the residual addition before it on request."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm as torch_rms_norm

from megatrain_kernels.backend import choose, wants_triton
from megatrain_kernels.blocks import block_rows
from megatrain_kernels.norm_operator import LARGEST_ROW, norm_op
from megatrain_kernels.rms_norm.reference import rms_norm_reference


class _BlockedRMSNorm(torch.autograd.Function):
    """For CPUs, where torch's own composition takes 2 to 9 times as long; keeps x and 1/rms only.

    x `(rows, size)`. Float32 at least inside; the weight's gradient is summed over rows in that type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
        """With n = x/rms and g = grad · weight: dx = (g - n · mean(g · n)) / rms, dweight = sum of grad · n."""
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
            result.copy_(inner.mul_(scale))
        return grad_x, grad_weight.to(weight.dtype), None


def _fastest(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch_rms_norm(x, weight.shape, weight, eps)
    flat = x.reshape(-1, x.shape[-1])
    return _BlockedRMSNorm.apply(flat, weight, eps).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of x `(..., size)` with weight `(size,)`.

    With `residual` (x's shape) x + residual is normalised, and (normalised, x + residual) is returned.
    """
    chosen = choose(backend, ("torch", "triton", "reference"))
    if wants_triton(x, backend, fits=x.shape[-1] <= LARGEST_ROW):
        flat, added = _rows(x), None if residual is None else _rows(residual)
        made, sums, _, _ = norm_op(flat, added, weight, None, eps, False, backend)
        return made.view(x.shape) if residual is None else (made.view(x.shape), sums.view(x.shape))
    total = x if residual is None else x + residual
    if chosen == "reference":
        out = rms_norm_reference(total, weight, eps)
    else:
        out = _fastest(total, weight, eps)
    return out if residual is None else (out, total)
