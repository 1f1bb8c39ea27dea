"""Grouped products of the package MegaBlocks (arXiv 2211.15841): CUDA, bf16.

It pins an old torch, so it has an environment of its own: `pip install --no-deps megablocks grouped_gemm` beside a
torch that both were built for.
"""

from importlib import import_module

import torch
from torch import Tensor

from megatrain.config.errors import UserError


def megablocks_product(x: Tensor, weights: Tensor, group_sizes: Tensor) -> Tensor:
    """Do as `megatrain_kernels.grouped_gemm` on bf16 tensors of a GPU; `group_sizes` is copied to the host."""
    multiply = import_module("megablocks.grouped_gemm_util").ops.gmm
    out: Tensor = multiply(x, weights, group_sizes.cpu(), trans_b=True)
    return out


def check_megablocks(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError unless MegaBlocks is installed and multiplies matrices of `dtype` on `device`.

    Raises:
        UserError: it is missing, and how to install it; or it can't compute that.
    """
    try:
        found = import_module("megablocks.grouped_gemm_util").grouped_gemm_is_available()
    except ImportError:
        found = False
    if not found:
        raise UserError(
            "moe.backend=megablocks needs the packages megablocks and grouped_gemm, built for this torch: "
            "install them with 'pip install --no-deps --no-build-isolation megablocks grouped_gemm', or set "
            "moe.backend=auto"
        )
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise UserError(
            f"moe.backend=megablocks computes in bf16 on a GPU, not in {str(dtype).removeprefix('torch.')} on "
            f"{device.type}: set train.precision=bf16, or another moe.backend"
        )
