"""Linear layers of the blocks in fp8: quantized operands, sums in float32, master weights and all else as before.

Weights and activations are e4m3, gradients e5m2 (arXiv 2209.05433, section 3.1), each with the scale of its present
largest number. Every product's operands are quantized along the dimension that it sums over:

| scaling | y = x wᵀ | x's gradient, g w | w's gradient, gᵀ x |
|---|---|---|---|
| tensor | one scale each | one scale each | one scale each |
| row | one a token; one an output | one a token; one an input | not quantized |
| block | groups of 128 in a token; blocks of 128 by 128 | the same | groups of 128 tokens of a channel |

block is DeepSeek-V3's way (arXiv 2412.19437, section 3.3.2). In row and block no number depends on which tokens are
computed together, or on how the layer is cut along whole groups: `layout.float8_problems` has the rules.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatrain.config.errors import UserError
from megatrain_kernels import quantize, scaled_matmul
from megatrain_kernels.backend import multiplies_fp8

Scaling = Literal["tensor", "row", "block"]
LEFT: dict[Scaling, str] = {"tensor": "tensor", "row": "row", "block": "group"}
"""How activations and gradients are quantized; weights as the scaling's own name says."""


def check_float8(device: torch.device) -> None:
    """Refuse a GPU that cannot multiply fp8. (A CPU computes with the dequantized numbers: slowly, for tests.)

    Raises:
        UserError: it has no tensor cores for these formats.
    """
    if device.type != "cpu" and not multiplies_fp8(device):
        raise UserError(
            "train.precision=fp8 needs a GPU with tensor cores for e4m3 and e5m2 (compute capability 8.9 or more): "
            "set train.precision=bf16"
        )


def float8_linears(model: nn.Module, scaling: Scaling) -> None:
    """Let every linear layer inside the blocks of `model` compute in fp8; names and types of parameters stay.

    Routers and stacked experts are no linear layers, and embedding and head no part of a block: they stay as they are.
    """
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            # Another class, not another forward of each: to the compiler all blocks are then alike.
            module.__class__ = Float8Linear
            module.scaling = scaling  # type: ignore[assignment]


class Float8Linear(nn.Linear):
    """A linear layer that computes in fp8."""

    scaling: Scaling

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in)` to `(..., out)`."""
        out: Tensor = _Product.apply(x.flatten(0, -2), self.weight, self.scaling)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def _product(left: Tensor, right: Tensor, dtype: str, by_left: str, by_right: str) -> Tensor:
    """left `(m, k)`, quantized to `dtype`, times the transpose of right `(n, k)` in e4m3; in left's type."""
    a, scale_a = quantize(left, dtype=dtype, scaling=by_left)
    b, scale_b = quantize(right, dtype="e4m3", scaling=by_right)
    return scaled_matmul(a, b.mT, scale_a, scale_b.mT if scale_b.ndim else scale_b, out_dtype=left.dtype)


class _Product(torch.autograd.Function):
    """x `(tokens, in)`, weight `(out, in)`; `(tokens, out)`."""

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
