"""Linear products of one input on a GPU: queries, keys and values; gate and up. Elsewhere layers are called one by one.

Parameters stay apart, under their names. One product makes all outputs, which are views of one buffer; its matrix is a
copy of the weights that nobody keeps. Of W weights in bf16 the copy moves 4 W bytes, W / 750 ns at 3 TB/s; with n rows
the products forward and backward are 6 n W operations, n W / 117,000 ns at 700 TFLOP/s. So the copy costs 156 / n of
them, whatever the layer's width: under 2 % from `ROWS` on. With fewer rows there is a product for each weight.

Backward, the gradients of the outputs are not put together: that copy would grow with the rows, and is more than one
product saves. The input's gradient is added up by the products themselves, so its parts are not written and read again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from megatrain.nn.layer import Linear
from megatrain_kernels.kernel import autocast_dtype

ROWS = 8192
"""Rows from which one product is worth a copy of its weights."""
DEVICES = ("cuda",)
"""On a CPU (two cores, float32 and bf16) neither one product nor the sum of gradients was faster."""

Products = Callable[[Tensor, Sequence[Linear]], tuple[Tensor, ...]]


def separate_products(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Return what each of `layers` makes of `x` `(..., in)`."""
    return tuple(layer(x) for layer in layers)


def joined_products(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Return what `separate_products` returns, computed together on a GPU.

    Layers are called one by one where a technique changes what one of them does, and where nothing is trained.
    """
    if x.device.type not in DEVICES or not all(map(_is_plain, layers)) or autocast_dtype(x) is not None:
        return separate_products(x, layers)
    weights = [layer.tensor("weight") for layer in layers]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))):
        return separate_products(x, layers)
    biases = [layer.tensor("bias") for layer in layers if layer.bias is not None]
    rows = x.flatten(0, -2)
    made = _Products.apply(rows, rows.shape[0] >= ROWS, len(layers), *weights, *biases)
    return tuple(out.unflatten(0, x.shape[:-1]) for out in made)


def _is_plain(layer: Linear) -> bool:
    """Tell whether nothing replaces, adds to or watches the layer's product."""
    watched = layer._forward_pre_hooks or layer._forward_hooks
    return layer.product is linear and layer.adapter is None and not watched


class _Products(torch.autograd.Function):
    """x `(rows, in)` times each weight `(out, in)` transposed, plus its bias; there are biases of all or of none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at_once: bool, n: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Multiply with all weights, at once or with one after the other."""
        weights, biases = parameters[:n], parameters[n:]
        ctx.save_for_backward(x, *weights)
        ctx.biased = bool(biases)
        if at_once:
            made = linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
            return made.split([len(weight) for weight in weights], -1)
        return tuple(map(linear, [x] * n, weights, biases or [None] * n))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, of the weights and of the biases."""
        x, *weights = ctx.saved_tensors
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                for_x.addmm_(grad, weight)
        wanted = ctx.needs_input_grad[3:]
        made = [grad.T @ x if want else None for grad, want in zip(grads, wanted, strict=False)]
        if ctx.biased:
            pairs = zip(grads, wanted[len(grads) :], strict=True)
            made += [grad.sum(0) if want else None for grad, want in pairs]
        return for_x, None, None, *made
