"""Grouped products of the package MegaBlocks (arXiv 2211.15841): CUDA, bf16.

It requires torch<2.7.1 and numpy<2.1, older than this project's, so that no extra can name it: it has an environment of
its own (docs/engines.md). Read in version 0.10.0; never run on a GPU here.
"""

import warnings
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
    """Check that MegaBlocks is installed, and multiplies matrices of `dtype` on `device`.

    Raises:
        UserError: lists all that is missing, and what to do.
    """
    missing = []
    if device.type != "cuda":
        missing.append(f"a GPU (the model is on {device.type})")
    if dtype != torch.bfloat16:
        missing.append(f"train.precision=bf16 (it computes in {str(dtype).removeprefix('torch.')})")
    if error := _import_error():
        missing.append(
            f"the packages megablocks and grouped_gemm, built for torch {torch.__version__} ({error})"
        )
    if missing:
        raise UserError(
            f"moe.backend=megablocks needs {'; '.join(missing)}. Set moe.backend=auto, or make its environment as "
            "docs/engines.md says."
        )


def _import_error() -> str:
    """Return why the packages can't be used; empty if they can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what is told here
            found = import_module("megablocks.grouped_gemm_util").grouped_gemm_is_available()
    except Exception as error:  # built for another torch, an extension raises what it likes
        return f"{type(error).__name__}: {error}"
    return "" if found else "grouped_gemm can't be imported"
