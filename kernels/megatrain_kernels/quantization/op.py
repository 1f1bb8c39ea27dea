"""Quantization and its inverse as PyTorch operators: Triton, or plain PyTorch.

The operators know codes as bytes (uint8), whatever the format: torch's own checks of an operator cannot compare fp8.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.backend import choose, interpreting, triton_runs_on
from megatrain_kernels.quantization.formats import (
    FORMATS,
    SMALLEST_SCALE,
    scale_shape,
    tiles_of,
    unpacked_shape,
)
from megatrain_kernels.quantization.reference import dequantize_reference, quantize_reference

KNOWN = (torch.bfloat16, torch.float16, torch.float32)


def _triton(backend: str, x: Tensor) -> Any:
    """The module of kernels where they are to run, else None: by name, since a CPU machine may lack triton."""
    if backend == "triton" or (backend == "auto" and triton_runs_on(x)):
        return import_module("megatrain_kernels.quantization.triton")
    return None


@torch.library.custom_op("megatrain::quantize", mutates_args=())
def quantize_op(x: Tensor, dtype: str, scaling: str, group_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of `quantize`."""
    if not x.numel():
        codes, scales = _fake(x, dtype, scaling, group_size, backend)
        return codes, scales.fill_(SMALLEST_SCALE)
    kernels = None if x.dtype == torch.float64 else _triton(backend, x)
    run = quantize_reference if kernels is None else kernels.quantize
    values, scales = run(x, dtype, scaling, group_size)
    return values.contiguous().view(torch.uint8), scales.contiguous()


@quantize_op.register_fake
def _fake(x: Tensor, dtype: str, scaling: str, group_size: int, backend: str) -> tuple[Tensor, Tensor]:
    halves = 2 if dtype == "int4" else 1
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // halves), dtype=torch.uint8)
    return codes, x.new_empty(scale_shape(x.shape, scaling, group_size), dtype=torch.float32)


@torch.library.custom_op("megatrain::dequantize", mutates_args=())
def dequantize_op(
    codes: Tensor,
    scales: Tensor,
    dtype: str,
    scaling: str,
    group_size: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Numbers of `dequantize`."""
    if not codes.numel():
        return _fake_dequantize(codes, scales, dtype, scaling, group_size, out_dtype, backend)
    kernels = None if out_dtype == torch.float64 else _triton(backend, codes)
    values = codes.view(FORMATS[dtype].dtype)
    if kernels is None:
        back = dequantize_reference(values, scales, dtype, scaling, group_size)
        return back.to(out_dtype).contiguous()
    made: Tensor = kernels.dequantize(values, scales, dtype, scaling, group_size, out_dtype)
    return made


@dequantize_op.register_fake
def _fake_dequantize(
    codes: Tensor, scales: Tensor, dtype: str, scaling: str, group_size: int, out_dtype: torch.dtype, _: str
) -> Tensor:
    return codes.new_empty(unpacked_shape(codes, dtype), dtype=out_dtype)


def quantize(
    x: Tensor, *, dtype: str, scaling: str = "tensor", group_size: int = 128, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Numbers of 8 or 4 bits with a scale for each tile, that of its largest number.

    Args:
        x: `(..., rows, cols)`, float32, bfloat16, float16, or float64 (which becomes float32 first).
        dtype: "e4m3" or "e5m2" (fp8, arXiv 2209.05433), "int8", or "int4", which wants an even number of columns.
        scaling: "tensor": one scale. "row": one a row. "group": one for each `group_size` neighbours in a row.
            "block": one for each `group_size` by `group_size` block of the last two dimensions (groups and blocks of
            128: DeepSeek-V3, arXiv 2412.19437, section 3.3.2). The last group or block may be smaller.

    Returns:
        values: as x, in torch.float8_e4m3fn, float8_e5m2, int8, or, two a byte with the first in the low half, uint8
            `(..., rows, cols / 2)`. Always row by row in memory.
        scales: float32, `()`, `(..., rows, 1)`, `(..., rows, groups)` or `(..., blocks down, blocks across)`. Finite
            and at least 2^-126, also where all is zero; a tile that holds NaN or infinity has scale NaN and values 0,
            so that all of it comes back as NaN and no error is hidden.

    Raises:
        ValueError: no such format, scaling or backend, or a shape or type that it cannot take.
    """
    _check(dtype, backend, x)
    if x.dtype not in (*KNOWN, torch.float64):
        raise ValueError(f"{x.dtype}: must be float32, bfloat16, float16 or float64")
    if dtype == "int4" and (x.ndim == 0 or x.shape[-1] % 2):
        raise ValueError(
            f"int4 are stored in pairs, and the shape {tuple(x.shape)} does not end in an even number"
        )
    if dtype == "int4" and group_size % 2:
        raise ValueError(f"group_size={group_size}: int4 are stored in pairs, so it must be even")
    tiles_of(x.shape, scaling, group_size)
    codes, scales = quantize_op(x.detach(), dtype, scaling, group_size, backend)
    return codes.view(FORMATS[dtype].dtype), scales


def dequantize(
    values: Tensor,
    scales: Tensor,
    *,
    dtype: str,
    scaling: str = "tensor",
    group_size: int = 128,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """value · scale, computed in float32: what `quantize` with the same options stands for, in `out_dtype`.

    Raises:
        ValueError: the scales are not those of these options, or no such format, scaling or backend.
    """
    _check(dtype, backend, values)
    expected = scale_shape(unpacked_shape(values, dtype), scaling, group_size)
    if tuple(scales.shape) != expected or values.dtype != FORMATS[dtype].dtype:
        raise ValueError(
            f"values {values.dtype} and scales {tuple(scales.shape)} do not fit dtype={dtype!r}, scaling={scaling!r}, "
            f"group_size={group_size}: must be {FORMATS[dtype].dtype} and {expected}"
        )
    codes = values.contiguous().view(torch.uint8)
    out: Tensor = dequantize_op(codes, scales, dtype, scaling, group_size, out_dtype, backend)
    return out


def _check(dtype: str, backend: str, x: Tensor) -> None:
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r}: must be {', '.join(FORMATS)}")
    choose(backend, ("torch", "triton"))
    if backend == "triton" and (not (triton_runs_on(x) or interpreting()) or x.dtype == torch.float64):
        raise ValueError(
            f"backend='triton' needs a CUDA device and at most float32; got {x.device.type}, {x.dtype}"
        )
