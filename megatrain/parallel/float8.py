"""fp8 training: the linear layers of the blocks multiply 8-bit operands; sums and master weights stay float32.

Weights and activations are e4m3, gradients e5m2 (arXiv 2209.05433, section 3.1), each with the scale of its present
largest magnitude. Every product's operands are quantized along the dimension that it sums over:

| scaling | y = x wᵀ | x's gradient, g w | w's gradient, gᵀ x |
|---|---|---|---|
| tensor | one scale each | one scale each | one scale each |
| row | one a token; one an output | one a token; one an input | not quantized |
| block | groups of 128 in a token; blocks of 128 by 128 | the same | groups of 128 tokens of a channel |

block is DeepSeek-V3's method (arXiv 2412.19437, section 3.3.2). In row and block no number depends on which tokens are
computed together, or on how the layer is sharded along full groups: `layout.float8_problems` has the rules.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain.config.errors import UserError
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh
from megatrain_kernels import quantize, scaled_matmul
from megatrain_kernels.backend import multiplies_fp8

Scaling = Literal["tensor", "row", "block"]
LEFT: dict[Scaling, str] = {"tensor": "tensor", "row": "row", "block": "group"}
"""Quantization of activations and gradients; weights are quantized as the scaling's name says."""


def check_float8(device: torch.device) -> None:
    """Refuse a GPU that cannot multiply fp8. (A CPU computes with the dequantized numbers, slowly, for tests.)

    Raises:
        UserError: `device` has no tensor cores for these formats.
    """
    if device.type != "cpu" and not multiplies_fp8(device):
        raise UserError(
            "train.precision=fp8 needs a GPU with tensor cores for e4m3 and e5m2 (compute capability 8.9 or more): "
            "set train.precision=bf16"
        )


def float8_linears(
    model: Decoder, plan: Plan, mesh: Mesh | None, cfg: ParallelConfig, *, scaling: Scaling
) -> None:
    """Let every linear layer inside the blocks of `model` compute in fp8; parameter names and dtypes are unchanged.

    Routers, stacked experts, the embedding and the head are unchanged.
    """
    for _, block in model.blocks():
        for module in block.modules():
            if isinstance(module, Linear):
                replace_seam(module, "product", partial(float8_linear, scaling=scaling))


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, scaling: Scaling) -> Tensor:
    """Return x wᵀ + bias, computed in fp8: x `(..., in)`, weight `(out, in)`; `(..., out)`."""
    out: Tensor = _Product.apply(x.flatten(0, -2), weight, scaling)
    out = out.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _product(left: Tensor, right: Tensor, dtype: str, by_left: str, by_right: str) -> Tensor:
    """Multiply left `(m, k)`, quantized to `dtype`, with right `(n, k)` transposed, in e4m3, in left's type."""
    a, scale_a = quantize(left, dtype=dtype, scaling=by_left)
    b, scale_b = quantize(right, dtype="e4m3", scaling=by_right)
    return scaled_matmul(a, b.mT, scale_a, scale_b.mT if scale_b.ndim else scale_b, out_dtype=left.dtype)


class _Product(torch.autograd.Function):
    """x `(tokens, in)` times weight `(out, in)` transposed: `(tokens, out)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        return _product(x, weight, "e4m3", LEFT[scaling], scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, weight), scaling = grads, ctx.saved_tensors, ctx.scaling
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = _product(grad, weight.mT, "e5m2", LEFT[scaling], scaling)
        if ctx.needs_input_grad[1]:
            if scaling == "row":
                for_weight = grad.mT @ x
            else:
                for_weight = _product(grad.mT, x.mT, "e5m2", LEFT[scaling], LEFT[scaling])
        return for_x, for_weight, None
