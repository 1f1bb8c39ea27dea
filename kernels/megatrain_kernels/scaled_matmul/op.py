"""The product of scaled fp8 matrices as a PyTorch operator: torch's own, Triton, or dequantized.

The operator knows codes as bytes (uint8): torch's own checks of an operator cannot compare fp8.
"""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.backend import choose, has_triton, interpreting
from megatrain_kernels.scaled_matmul.reference import scaled_matmul_reference, tile_of

KNOWN = (torch.float8_e4m3fn, torch.float8_e5m2)
_failed: set[tuple[Any, ...]] = set()
"""Kinds of calls that a GPU refused: dequantized matrices are multiplied there from then on."""


@cache
def _capability(index: int) -> tuple[int, int]:
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(index)


def multiplies_fp8(device: torch.device) -> bool:
    """Has the device tensor cores for fp8 in these formats?"""
    return device.type == "cuda" and _capability(device.index or 0) >= (8, 9)


def _native(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor | None:
    """torch's own product where it is one kernel: one scale each, or one a row each (bf16 only); else None."""
    (m, k), n = a.shape, b.shape[0]
    by_row = scale_a.shape == (m, 1) and scale_b.shape == (n, 1)
    if by_row and (out_dtype != torch.bfloat16 or _capability(a.device.index or 0) < (9, 0)):
        return None
    if k % 16 or n % 16 or not (by_row or scale_a.ndim == scale_b.ndim == 0):
        return None
    made: Tensor = torch._scaled_mm(
        a.contiguous(),
        b.contiguous().T,
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.T.contiguous() if by_row else scale_b,
        out_dtype=out_dtype,
    )
    return made


def _on_gpu(a: Tensor, b: Tensor, *args: Any) -> Tensor | None:
    """The fastest product there, or None where none runs."""
    scale_a, scale_b, out_dtype, group_size = args
    made = _native(a, b, scale_a, scale_b, out_dtype)
    if made is None and takes_triton(a, group_size):
        # Tensor cores read fp8 along k.
        kernels = import_module("megatrain_kernels.scaled_matmul.triton")
        made = kernels.scaled_matmul(a.contiguous(), b.contiguous(), *args)
    return made


def takes_triton(a: Tensor, group_size: int) -> bool:
    """Can the kernel take it? (In the interpreter too: only tests ask for that.)"""
    here = multiplies_fp8(a.device) or (a.device.type == "cpu" and interpreting())
    return here and has_triton() and group_size % 32 == 0


@torch.library.custom_op("megatrain::scaled_matmul", mutates_args=())
def scaled_matmul_op(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    a_format: torch.dtype,
    b_format: torch.dtype,
    out_dtype: torch.dtype,
    group_size: int,
    backend: str,
) -> Tensor:
    """(a · scale_a) (b · scale_b)ᵀ of codes a `(m, k)` and b `(n, k)`, in fp8 of these formats."""
    a, b = a.view(a_format), b.view(b_format)
    args = (scale_a, scale_b, out_dtype, group_size)
    if not (a.numel() and b.numel()):
        return a.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)
    if backend == "triton":
        made: Tensor = import_module("megatrain_kernels.scaled_matmul.triton").scaled_matmul(a, b, *args)
        return made
    kind = (a_format, b_format, out_dtype, scale_a.ndim, scale_a.shape == (a.shape[0], 1))
    if backend == "auto" and multiplies_fp8(a.device) and out_dtype != torch.float64 and kind not in _failed:
        try:
            fast = _on_gpu(a, b, *args)
            if fast is not None:
                return fast
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _failed.add(kind)
            warnings.warn(f"scaled_matmul: dequantized products take over: {error}", stacklevel=2)
    return scaled_matmul_reference(a, b, *args)


@scaled_matmul_op.register_fake
def _fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    a_format: torch.dtype,
    b_format: torch.dtype,
    out_dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@register_flop_formula(torch.ops.megatrain.scaled_matmul)
def _flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[0])


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    group_size: int = 128,
    backend: str = "auto",
) -> Tensor:
    """The product of two fp8 matrices, each value times the scale of its tile; sums in float32.

    Args:
        a, scale_a: `(m, k)` and its scales as `quantize` returns them, of any scaling.
        b, scale_b: `(k, n)` and its scales, in which rows and columns have changed places: the transposes (`.mT`) of
            what `quantize` returns for the matrix `(n, k)`; or of one scale `()`.
        out_dtype: also float64, which is computed in float64.
        group_size: of both, where they have groups or blocks.
        backend: "auto" takes torch's own product on a GPU with tensor cores for fp8 where there is one scale, or one
            a row, and Triton where there are groups or blocks. Elsewhere dequantized matrices are multiplied. (torch
            2.13 has the product on CPUs too, no faster there, and with scales by row it rounds twice.)

    Returns:
        `(m, n)`; not differentiable.

    Raises:
        ValueError: sizes or scales that do not fit, no fp8, or no backend of that name.
    """
    if a.dtype not in KNOWN or b.dtype not in KNOWN or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)}: must be fp8 and (m, k) and (k, n)"
        )
    for x, scale in ((a, scale_a), (b.mT, scale_b.mT if scale_b.ndim == 2 else scale_b)):
        tile_of(x.shape, scale.shape, group_size)
    choose(backend, ("torch", "triton"))
    if backend == "triton" and (not takes_triton(a, group_size) or out_dtype == torch.float64):
        raise ValueError(
            "backend='triton' needs a CUDA device with tensor cores for fp8, groups of a multiple of 32, and at most "
            f"float32; got {a.device.type}, {group_size}, {out_dtype}"
        )
    scale_b = scale_b.mT if scale_b.ndim == 2 else scale_b
    codes = (x.view(torch.uint8) for x in (a, b.mT))
    options = (a.dtype, b.dtype, out_dtype, group_size, backend)
    out: Tensor = scaled_matmul_op(*codes, scale_a, scale_b, *options)
    return out
