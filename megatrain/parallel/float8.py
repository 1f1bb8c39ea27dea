"""fp8 training: the linear layers of the blocks multiply 8-bit operands; sums and master weights stay float32.

Weights and activations are e4m3, gradients e5m2 (arXiv 2209.05433, section 3.1) or e4m3, each with the scale of its
present largest magnitude. Every product's operands are quantized along the dimension that it sums over:

| scaling | y = x wᵀ | x's gradient, g w | w's gradient, gᵀ x |
|---|---|---|---|
| tensor | one scale each | one scale each | one scale each |
| row | one a token; one an output | one a token; one an input | not quantized |
| block | groups of 128 in a token; blocks of 128 by 128 | the same | groups of 128 tokens of a channel |

block is DeepSeek-V3's method (arXiv 2412.19437, section 3.3.2). In row and block no number depends on which tokens are
computed together, or on how the layer is sharded along full groups: `layout.float8_problems` has the rules.

Transposing a matrix transposes its codes of tensor and block, so such a matrix is quantized once for both products that
it takes part in. A weight's codes last for all micro-batches of a step (`KeptCodes`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain.config.errors import UserError
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import keeps_float8_codes
from megatrain.parallel.mesh import Mesh
from megatrain_kernels import quantize, scaled_matmul
from megatrain_kernels.backend import multiplies_fp8

Scaling = Literal["tensor", "row", "block"]
Codes = tuple[Tensor, Tensor]
"""Values and scales of a matrix, as `quantize` returns them."""
LEFT: dict[Scaling, str] = {"tensor": "tensor", "row": "row", "block": "group"}
"""Quantization of activations and gradients; weights are quantized as the scaling's name says."""


@dataclass(frozen=True)
class Float8:
    """How linear layers quantize."""

    scaling: Scaling
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    """Format of the gradients of outputs."""


class KeptCodes:
    """Codes of weights: within a `with` statement, in which no weight may change, each is made once.

    Nothing is kept outside of one, so neither updates nor averages that are swapped in can meet old codes.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Codes] | None = None

    def __enter__(self) -> None:
        self._made = {}

    def __exit__(self, *_: object) -> None:
        self._made = None

    def get(self, key: tuple[str, str], make: Callable[[], Codes]) -> Codes:
        """Return the codes of that key, a layer and a use, from `make` where none are kept."""
        if self._made is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class WeightCodes(NamedTuple):
    """Where a layer finds the codes of its weight."""

    kept: KeptCodes | None = None
    """None: nothing is kept."""
    layer: str = ""

    def get(self, use: str, make: Callable[[], Codes]) -> Codes:
        """Return the codes for that use, from `make` where none are kept."""
        return make() if self.kept is None else self.kept.get((self.layer, use), make)


NOTHING_KEPT = WeightCodes()


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
    model: Decoder, plan: Plan, mesh: Mesh | None, cfg: ParallelConfig, *, options: Float8, kept: KeptCodes
) -> None:
    """Let every linear layer inside the blocks of `model` compute in fp8; parameter names and dtypes are unchanged.

    Routers, stacked experts, the embedding and the head are unchanged.

    Args:
        kept: takes the weights' codes, under the layers' names, where the layout lets them be kept.
    """
    keeps = keeps_float8_codes(cfg)  # if not, blocks are alike to a compiler, without names
    for place, block in model.blocks():
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                codes = WeightCodes(kept, f"{place}.{name}") if keeps else NOTHING_KEPT
                replace_seam(module, "product", partial(float8_linear, options=options, codes=codes))


def float8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, options: Float8, codes: WeightCodes = NOTHING_KEPT
) -> Tensor:
    """Return x wᵀ + bias, computed in fp8: x `(..., in)`, weight `(out, in)`; `(..., out)`."""
    out: Tensor = _Product.apply(x.flatten(0, -2), weight, options, codes)
    out = out.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _product(left: Codes, right: Codes, out_dtype: torch.dtype) -> Tensor:
    """Multiply left `(m, k)` with right `(n, k)` transposed."""
    (a, scale_a), (b, scale_b) = left, right
    return scaled_matmul(a, b.mT, scale_a, scale_b.mT if scale_b.ndim else scale_b, out_dtype=out_dtype)


def _turned(codes: Codes) -> Codes:
    """Return the codes of the transpose, row by row in memory, as products read them: of one scale, or of blocks."""
    values, scales = codes
    return values.mT.contiguous(), scales.mT.contiguous() if scales.ndim else scales


class _Product(torch.autograd.Function):
    """x `(tokens, in)` times weight `(out, in)` transposed: `(tokens, out)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: Float8, kept: WeightCodes) -> Tensor:
        scaling = options.scaling
        codes = quantize(x, dtype="e4m3", scaling=LEFT[scaling])
        # Those of one scale serve the weight's gradient as well.
        ctx.save_for_backward(weight, *(codes if scaling == "tensor" else (x,)))
        ctx.options = options, kept
        return _product(codes, _weight_codes(weight, scaling, kept), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight, *of_x), (options, kept) = grads, ctx.saved_tensors, ctx.options
        scaling, dtype = options.scaling, options.gradients
        for_x = for_weight = None
        # In row, the gradient of the weight takes no codes; in block, others.
        if ctx.needs_input_grad[0] or scaling == "tensor":
            codes = quantize(grad, dtype=dtype, scaling=LEFT[scaling])
        if ctx.needs_input_grad[0]:
            for_x = _product(codes, _turned_weight_codes(weight, scaling, kept), grad.dtype)
        if ctx.needs_input_grad[1]:
            if scaling == "row":
                for_weight = grad.mT @ of_x[0]
            elif scaling == "tensor":
                for_weight = _product(_turned(codes), _turned((of_x[0], of_x[1])), grad.dtype)
            else:
                left = quantize(grad.mT, dtype=dtype, scaling="group")
                for_weight = _product(left, quantize(of_x[0].mT, dtype="e4m3", scaling="group"), grad.dtype)
        return for_x, for_weight, None, None


def _weight_codes(weight: Tensor, scaling: Scaling, kept: WeightCodes) -> Codes:
    return kept.get("forward", partial(quantize, weight, dtype="e4m3", scaling=scaling))


def _turned_weight_codes(weight: Tensor, scaling: Scaling, kept: WeightCodes) -> Codes:
    def make() -> Codes:
        if scaling == "row":
            return quantize(weight.mT, dtype="e4m3", scaling=scaling)
        return _turned(_weight_codes(weight, scaling, kept))

    return kept.get("backward", make)
