"""Quantization and its inverse: the public functions and their PyTorch operators.

The operators know codes as bytes (uint8), whatever the format: torch's own checks of an operator cannot compare fp8.
"""

import torch
from torch import Tensor

from megatrain_kernels.kernel import (
    KERNEL_DTYPES,
    Kernel,
    register,
    require,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.quantization.cases import DEQUANTIZE_SUITE, QUANTIZE_SUITE
from megatrain_kernels.quantization.reference import (
    FORMATS,
    SMALLEST_SCALE,
    dequantize_reference,
    quantize_reference,
    scale_shape,
    tiles_of,
    unpacked_shape,
)


@torch.library.custom_op("megatrain::quantize", mutates_args=())
def quantize_op(x: Tensor, dtype: str, scaling: str, group_size: int, path: str) -> tuple[Tensor, Tensor]:
    """Return codes and scales of `quantize`."""
    if not x.numel():
        codes, scales = _fake(x, dtype, scaling, group_size, path)
        return codes, scales.fill_(SMALLEST_SCALE)
    options = (dtype, scaling, group_size)
    made: tuple[Tensor, Tensor] | None = run_triton(
        QUANTIZE, path, "quantize", x, *options, kind=(x.dtype, *options)
    )
    values, scales = quantize_reference(x, *options) if made is None else made
    return values.contiguous().view(torch.uint8), scales.contiguous()


@quantize_op.register_fake
def _fake(x: Tensor, dtype: str, scaling: str, group_size: int, path: str) -> tuple[Tensor, Tensor]:
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
    path: str,
) -> Tensor:
    """Return the numbers of `dequantize`."""
    if not codes.numel():
        return _fake_dequantize(codes, scales, dtype, scaling, group_size, out_dtype, path)
    values, options = codes.view(FORMATS[dtype].dtype), (dtype, scaling, group_size)
    made: Tensor | None = run_triton(
        DEQUANTIZE, path, "dequantize", values, scales, *options, out_dtype, kind=(out_dtype, *options)
    )
    if made is None:
        return dequantize_reference(values, scales, *options).to(out_dtype).contiguous()
    return made


@dequantize_op.register_fake
def _fake_dequantize(
    codes: Tensor, scales: Tensor, dtype: str, scaling: str, group_size: int, out_dtype: torch.dtype, _: str
) -> Tensor:
    return codes.new_empty(unpacked_shape(codes, dtype), dtype=out_dtype)


def quantize(
    x: Tensor, *, dtype: str, scaling: str = "tensor", group_size: int = 128, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize to numbers of 8 or 4 bits with a scale for each tile, that of its largest number.

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
    _check_format(dtype)
    rule = "x must be float32, bfloat16, float16 or float64"
    require(x.dtype in (*KERNEL_DTYPES, torch.float64), rule, x=x)
    if dtype == "int4":
        pairs = x.ndim > 0 and x.shape[-1] % 2 == 0
        require(pairs, "the last dimension must be even, since int4 codes are stored in pairs", x=x)
        if group_size % 2:
            raise ValueError(f"group_size={group_size}: must be even, since int4 codes are stored in pairs")
    tiles_of(x.shape, scaling, group_size)
    path = select(QUANTIZE, backend, x)
    codes, scales = quantize_op(x.detach(), dtype, scaling, group_size, path)
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
    """Return value · scale, computed in float32: what `quantize` with the same options stands for, in `out_dtype`.

    Raises:
        ValueError: values and scales that are not those of these options, or no such format, scaling or backend.
    """
    _check_format(dtype)
    given = {"values": values, "scales": scales}
    known = FORMATS[dtype].dtype
    require(values.ndim > 0 and values.dtype == known, f"values of {dtype} must be {known}", **given)
    expected = scale_shape(unpacked_shape(values, dtype), scaling, group_size)
    require(
        tuple(scales.shape) == expected and scales.dtype == torch.float32,
        f"scales of scaling={scaling!r}, group_size={group_size} must be float32 {expected}",
        **given,
    )
    require_one_device(**given)
    if out_dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"out_dtype={out_dtype}: must be float32, bfloat16, float16 or float64")
    path = select(DEQUANTIZE, backend, values, out_dtype)
    codes = values.contiguous().view(torch.uint8)
    out: Tensor = dequantize_op(codes, scales, dtype, scaling, group_size, out_dtype, path)
    return out


def _check_format(dtype: str) -> None:
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r}: must be {', '.join(FORMATS)}")


def _unsupported_result(values: Tensor, out_dtype: torch.dtype) -> str | None:
    return None if out_dtype in KERNEL_DTYPES else f"at most float32 as out_dtype; got {out_dtype}"


QUANTIZE = register(
    Kernel(function=quantize, reference=quantize_reference, suite=QUANTIZE_SUITE, unsupported=wrong_dtype)
)
DEQUANTIZE = register(
    Kernel(
        function=dequantize,
        reference=dequantize_reference,
        suite=DEQUANTIZE_SUITE,
        unsupported=_unsupported_result,
    )
)
