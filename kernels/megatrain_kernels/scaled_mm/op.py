"""The product of two scaled fp8 matrices: the public function and its PyTorch operator.

The operator knows codes as bytes (uint8): torch's own checks of an operator cannot compare fp8.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.backend import cuda_capability, multiplies_fp8, triton_runs_on
from megatrain_kernels.kernel import (
    KERNEL_DTYPES,
    Kernel,
    attempt,
    register,
    require,
    require_one_device,
    run_triton,
    select,
)
from megatrain_kernels.scaled_mm.cases import SUITE
from megatrain_kernels.scaled_mm.reference import scaled_matmul_reference, tile_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
    path: str,
) -> Tensor:
    """Return (a · scale_a) (b · scale_b)ᵀ of codes a `(m, k)` and b `(n, k)`, in fp8 of these formats."""
    a, b = a.view(a_format), b.view(b_format)
    if not (a.numel() and b.numel()):
        return a.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)
    kind = (a_format, b_format, out_dtype, scale_a.ndim, scale_a.shape == (a.shape[0], 1))
    made: Tensor | None = None
    if path in ("torch", "triton_or_torch") and _torch_has_one_kernel(a, b, scale_a, scale_b, out_dtype):
        call = partial(_by_torch, a, b, scale_a, scale_b, out_dtype)
        made = attempt("scaled_matmul", "torch's product", call, kind=kind)
    if made is None:
        args = (scale_a, scale_b, out_dtype, group_size)
        made = run_triton(SCALED_MATMUL, path, "scaled_matmul", a, b, *args, kind=kind)
        return scaled_matmul_reference(a, b, *args) if made is None else made
    return made


def _torch_has_one_kernel(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
) -> bool:
    """Tell where torch's own product is one kernel: for one scale each, or one a row each (bf16 on sm_90 only)."""
    (m, k), n = a.shape, b.shape[0]
    by_row = scale_a.shape == (m, 1) and scale_b.shape == (n, 1)
    if not multiplies_fp8(a.device) or out_dtype == torch.float64:
        return False
    if by_row and (out_dtype != torch.bfloat16 or cuda_capability(a.device.index or 0) < (9, 0)):
        return False
    return k % 16 == 0 and n % 16 == 0 and (by_row or scale_a.ndim == scale_b.ndim == 0)


def _by_torch(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    made: Tensor = torch._scaled_mm(
        a.contiguous(),
        b.contiguous().T,
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.T.contiguous() if scale_b.ndim == 2 else scale_b,
        out_dtype=out_dtype,
    )
    return made


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
    """Multiply two fp8 matrices, each value times the scale of its tile; sums in float32.

    Args:
        a, scale_a: `(m, k)` and its scales as `quantize` returns them, of any scaling.
        b, scale_b: `(k, n)` and its scales, in which rows and columns have changed places: the transposes (`.mT`) of
            what `quantize` returns for the matrix `(n, k)`; or of one scale `()`.
        out_dtype: also float64, which is computed in float64.
        group_size: of both, where they have groups or blocks.
        backend: "torch" takes torch's own product on a GPU with tensor cores for fp8 where there is one scale, or one
            a row, and multiplies dequantized matrices elsewhere; "auto" takes Triton on such a GPU where there are
            groups or blocks. (torch 2.13 has the product on CPUs too, no faster there, and with scales by row it rounds
            twice.)

    Returns:
        `(m, n)`; not differentiable.

    Raises:
        ValueError: shapes, types, scales or devices that do not fit, or no backend of that name.
    """
    given = {"a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b}
    sizes = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    rule = "a and b must be fp8 and (m, k) and (k, n)"
    require(sizes and a.dtype in FP8 and b.dtype in FP8, rule, a=a, b=b)
    real = scale_a.dtype == scale_b.dtype == torch.float32
    require(real, "scale_a and scale_b must be float32", scale_a=scale_a, scale_b=scale_b)
    require_one_device(**given)
    scale_b = scale_b.mT if scale_b.ndim == 2 else scale_b
    if group_size < 1:
        raise ValueError(f"group_size={group_size}: must be 1 or more")
    for x, scale in ((a, scale_a), (b.mT, scale_b)):
        tile_of(x.shape, scale.shape, group_size)
    if out_dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"out_dtype={out_dtype}: must be float32, bfloat16, float16 or float64")
    path = select(SCALED_MATMUL, backend, a, out_dtype, group_size)
    codes = (x.view(torch.uint8) for x in (a, b.mT))
    options = (a.dtype, b.dtype, out_dtype, group_size, path)
    out: Tensor = scaled_matmul_op(*codes, scale_a, scale_b, *options)
    return out


def _unsupported(a: Tensor, out_dtype: torch.dtype, group_size: int) -> str | None:
    if group_size % 32:
        return f"groups of a multiple of 32; got {group_size}"
    return None if out_dtype in KERNEL_DTYPES else f"at most float32 as out_dtype; got {out_dtype}"


def _runs_on(a: Tensor) -> bool:
    return triton_runs_on(a) and multiplies_fp8(a.device)


SCALED_MATMUL = register(
    Kernel(
        function=scaled_matmul,
        reference=scaled_matmul_reference,
        suite=SUITE,
        unsupported=_unsupported,
        runs_on=_runs_on,
        device_needed="a CUDA device with tensor cores for fp8",
    )
)
