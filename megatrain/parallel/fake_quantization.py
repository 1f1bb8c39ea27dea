"""Quantization-aware training: linear layers multiply with weights rounded to what they will be compressed to.

The gradient passes to the weights as if they had not been rounded (straight-through, arXiv 1308.3432). Weights in
checkpoints are those before rounding. A group of inputs that share a scale lies on one rank, so that no number depends
on how the layer is sharded: `layout.group_problems` has the rule.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh
from megatrain_kernels import dequantize, quantize


def fake_quantized_linears(
    model: Decoder, plan: Plan, mesh: Mesh | None, cfg: ParallelConfig, *, number: str, group: int
) -> None:
    """Let every linear layer inside the blocks of `model` multiply with rounded weights; its parameters stay exact.

    Args:
        number: int8 or int4. group: inputs that share a scale.
    """
    for _, block in model.blocks():
        for module in block.modules():
            if isinstance(module, Linear):
                replace_seam(module, "product", partial(fake_quantized_linear, number=number, group=group))


def fake_quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, number: str, group: int
) -> Tensor:
    """Return x wᵀ + bias, x `(..., in)`, with the weight `(out, in)` rounded to codes of `number` in groups."""
    rounded: Tensor = _StraightThrough.apply(weight, number, group)
    return linear(x, rounded, bias)


class _StraightThrough(Function):
    """The weight after quantization and its inverse; the gradient is that of the weight itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, number: str, group: int) -> Tensor:
        codes, scales = quantize(weight, dtype=number, scaling="group", group_size=group)
        return dequantize(codes, scales, dtype=number, scaling="group", group_size=group).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None
