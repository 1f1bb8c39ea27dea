"""LayerNorm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm as torch_layer_norm

from megatrain_kernels.backend import choose, wants_triton
from megatrain_kernels.blocks import block_rows
from megatrain_kernels.layer_norm.reference import layer_norm_reference
from megatrain_kernels.norm_operator import LARGEST_ROW, norm_op


class _HalfLayerNorm(torch.autograd.Function):
    """For bf16 and fp16 on a CPU, where torch sums the gradients of weight and bias in that type.

    Over 4,096 rows torch's were off by 4 to 10 %; these are summed in float32. x `(rows, size)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        # With a float32 weight torch keeps mean and 1/deviation in float32 too.
        wide_bias = None if bias is None else bias.float()
        out, mean, inverse = torch.native_layer_norm(x, weight.shape, weight.float(), wide_bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension of x `(..., size)` with weight and bias `(size,)`."""
    chosen = choose(backend, ("torch", "triton", "reference"))
    if wants_triton(x, backend, fits=x.shape[-1] <= LARGEST_ROW):
        out, *_ = norm_op(x.reshape(-1, x.shape[-1]), None, weight, bias, eps, True, backend)
        return out.view(x.shape)
    if chosen == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    half = x.dtype in (torch.bfloat16, torch.float16)
    if half and x.device.type == "cpu" and weight.requires_grad and not torch.compiler.is_compiling():
        return _HalfLayerNorm.apply(x.reshape(-1, x.shape[-1]), weight, bias, eps).view(x.shape)
    return torch_layer_norm(x, weight.shape, weight, bias, eps)
