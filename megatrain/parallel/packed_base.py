"""Frozen weights beside adapters in four bits (QLoRA, Dettmers et al., arXiv 2305.14314).

Adapters learn beside the weights as they are after rounding: codes of four bits with a scale for each group of inputs.
They are unpacked for each product, forward and backward, and never kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.lora_config import LoRAConfig
from megatrain_kernels import dequantize, quantize

FORMAT = {"dtype": "int4", "scaling": "group"}


def rounded(weight: Tensor, group: int) -> Tensor:
    """Return what is left of `weight` `(out, in)` after four bits, `group` inputs a scale."""
    codes, scales = quantize(weight, group_size=group, **FORMAT)
    return dequantize(codes, scales, group_size=group, **FORMAT).to(weight.dtype)  # type: ignore[arg-type]


class PackedProduct:
    """A linear layer's product with a weight that is kept in four bits; that of the layer itself is empty."""

    def __init__(self, weight: Tensor, group: int) -> None:
        self.codes, self.scales = quantize(weight, group_size=group, **FORMAT)
        self.group = group

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out if bias is None else out + bias


class _Product(Function):
    """x wᵀ with a packed weight, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedProduct) -> Tensor:
        """Unpack the weight, and multiply."""
        ctx.packed = packed
        return x @ _unpacked(packed, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Unpack it once more."""
        return grad @ _unpacked(ctx.packed, grad.dtype), None


def _unpacked(packed: PackedProduct, dtype: torch.dtype) -> Tensor:
    return dequantize(packed.codes, packed.scales, group_size=packed.group, **FORMAT).to(dtype)  # type: ignore[arg-type]


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linear layers of `model` that have adapters, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and layer.adapter is not None
    }


@torch.no_grad()
def pack_base(model: nn.Module, masters: dict[str, nn.Parameter], cfg: LoRAConfig) -> None:
    """Keep the weights beside adapters in four bits from now on, if `cfg` says so; call it when they are loaded.

    Args:
        masters: the parameters by name that `model` computes with copies of, or with themselves.
    """
    if not cfg.rank or cfg.base == "full":
        return
    for name, layer in adapted_layers(model).items():
        master = masters[f"{name}.weight"]
        replace_seam(layer, "product", PackedProduct(master.detach(), cfg.base_group))
        for parameter in (master, layer.weight):
            parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def round_base(model: nn.Module, cfg: LoRAConfig) -> None:
    """Round the weights beside adapters to what training has computed with, where they stay as they are."""
    if cfg.rank and cfg.base != "full":
        for layer in adapted_layers(model).values():
            layer.weight.copy_(rounded(layer.weight, cfg.base_group))
