"""Layers whose inputs are quantized as they come, as int8 with a scale for each token."""

from torch import Tensor
from torch.nn.functional import linear

from megatrain.config.errors import UserError
from megatrain.nn.layer import Linear, replace_seam
from megatrain.parallel.apply import ParallelModel
from megatrain_kernels import dequantize, quantize


def quantize_inputs(parallel: ParallelModel) -> None:
    """Let the linear layers inside the blocks quantize their inputs; the products are computed in the weights' type.

    Raises:
        UserError: tensor parallelism shards the inputs of some, so that each rank would take a scale of its own.
    """
    if parallel.cfg.tp > 1:
        raise UserError(
            "the model quantizes the inputs of its layers with a scale for each token (int8-dynamic), which --tp would "
            "give each rank of its own: use --tp 1, or --pp"
        )
    for model in parallel.models:
        for _, block in model.blocks():
            for module in block.modules():
                if isinstance(module, Linear):
                    replace_seam(module, "product", quantized_linear)


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x wᵀ + bias with x `(..., in)` rounded to int8, each token by its largest number."""
    codes, scales = quantize(x, dtype="int8", scaling="row")
    rounded = dequantize(codes, scales, dtype="int8", scaling="row").to(x.dtype)
    return linear(rounded, weight, bias)
