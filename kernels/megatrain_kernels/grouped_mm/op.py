"""Products of uneven groups of rows, each with its own matrix: the public function and its PyTorch operators."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.grouped_mm.cases import SUITE
from megatrain_kernels.grouped_mm.reference import grouped_gemm_reference
from megatrain_kernels.kernel import (
    KERNEL_DTYPES,
    Kernel,
    autocast_dtype,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)


@torch.library.custom_op("megatrain::grouped_gemm", mutates_args=())
def grouped_gemm_op(x: Tensor, weights: Tensor, group_sizes: Tensor, path: str) -> Tensor:
    """Return x_g weights_gᵀ; see `grouped_gemm`."""
    _check_sum(group_sizes, x)
    x, weights = _dense(x), _dense(weights)
    path = "torch" if path == "triton_or_torch" and _torch_has_one_kernel(x, weights) else path
    made: Tensor | None = run_triton(
        GROUPED_GEMM, path, "rows_product", x, weights, group_sizes, kind=(x.dtype,)
    )
    if made is not None:
        return made
    if _fits_grouped_mm(x, weights):
        return grouped_mm(x, weights.mT, offs=_ends(group_sizes))
    out = x.new_empty(x.shape[0], weights.shape[1])
    sizes = group_sizes.tolist()
    for rows, weight, result in zip(x.split(sizes), weights, out.split(sizes), strict=True):
        torch.mm(rows, weight.T, out=result)
    return out


@torch.library.custom_op("megatrain::grouped_outer", mutates_args=())
def grouped_outer_op(a: Tensor, b: Tensor, group_sizes: Tensor, path: str) -> Tensor:
    """Return a_gᵀ b_g `(groups, m, n)` of a `(tokens, m)` and b `(tokens, n)`; empty groups give 0."""
    _check_sum(group_sizes, a)
    a, b = _dense(a), _dense(b)
    path = "torch" if path == "triton_or_torch" and _torch_has_one_kernel(a, b) else path
    made: Tensor | None = run_triton(GROUPED_GEMM, path, "outer_product", a, b, group_sizes, kind=(a.dtype,))
    if made is not None:
        return made
    if _fits_grouped_mm(a, b):
        return grouped_mm(a.T, b, offs=_ends(group_sizes))
    out = a.new_empty(len(group_sizes), a.shape[1], b.shape[1])
    sizes = group_sizes.tolist()
    for left, right, result in zip(a.split(sizes), b.split(sizes), out, strict=True):
        torch.mm(left.T, right, out=result)
    return out


def _check_sum(group_sizes: Tensor, x: Tensor) -> None:
    """Check the sum of the groups on a CPU; a GPU would have to be waited for, and its kernels stay within x."""
    if group_sizes.device.type == "cpu" and int(group_sizes.sum()) != x.shape[0]:
        raise ValueError(
            f"group_sizes must add up to the {x.shape[0]} tokens of x; got {int(group_sizes.sum())}"
        )


def _torch_has_one_kernel(*tensors: Tensor) -> bool:
    """Tell where torch's product is one kernel: in bf16; in other types it is a loop that waits for the sizes."""
    return tensors[0].dtype == torch.bfloat16 and _fits_grouped_mm(*tensors)


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """Tell whether torch's product takes them: its rows must begin at multiples of 16 bytes."""
    return tensors[0].dtype in KERNEL_DTYPES and all(
        _row_step(t) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _row_step(t: Tensor) -> int:
    return max(t.stride()[-2:])


def _ends(group_sizes: Tensor) -> Tensor:
    return group_sizes.cumsum(0).to(torch.int32)


def _dense(t: Tensor) -> Tensor:
    """Return t if its matrices are stored row by row or column by column, else a copy.

    A gradient may be a view in which all elements are one.
    """
    rows = t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1]
    columns = t.stride(-2) == 1 and t.stride(-1) >= t.shape[-2]
    return t if rows or columns else t.contiguous()


@grouped_gemm_op.register_fake
def _fake(x: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@grouped_outer_op.register_fake
def _fake_outer(a: Tensor, b: Tensor, group_sizes: Tensor, *_: Any) -> Tensor:
    return a.new_empty(group_sizes.shape[0], a.shape[1], b.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.path = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, sizes = ctx.saved_tensors
    for_x = grouped_gemm_op(grad, weights.mT, sizes, ctx.path) if ctx.needs_input_grad[0] else None
    for_weights = grouped_outer_op(grad, x, sizes, ctx.path) if ctx.needs_input_grad[1] else None
    return for_x, for_weights, None, None


grouped_gemm_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.megatrain.grouped_gemm)
def _flops(x: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * x[0] * x[1] * weights[1])


@register_flop_formula(torch.ops.megatrain.grouped_outer)
def _outer_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def grouped_gemm(x: Tensor, weights: Tensor, group_sizes: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply uneven groups of rows, each with its own matrix: x_g weights_gᵀ.

    Args:
        x: `(tokens, in)`, sorted by group. weights: `(groups, out, in)`, in x's type.
        group_sizes: `(groups,)` int64 on x's device, 0 allowed; the sum is the number of tokens (checked on CPUs only).
        backend: "auto" takes torch's grouped product where it is one kernel or on a CPU, and Triton elsewhere.

    Returns:
        `(tokens, out)` in x's type.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, weights = x.to(dtype), weights.to(dtype)
    _check(x, weights, group_sizes)
    path = select(GROUPED_GEMM, backend, x)
    if path == "reference":
        _check_sum(group_sizes, x)
        return grouped_gemm_reference(x, weights, group_sizes)
    out: Tensor = grouped_gemm_op(x, weights, group_sizes, path)
    return out


def _check(x: Tensor, weights: Tensor, group_sizes: Tensor) -> None:
    given = {"x": x, "weights": weights, "group_sizes": group_sizes}
    sizes = (x.ndim, weights.ndim, group_sizes.ndim) == (2, 3, 1)
    require(
        sizes and x.shape[1] == weights.shape[2] and weights.shape[0] == group_sizes.shape[0] > 0,
        "x must be (tokens, in), weights (groups, out, in) and group_sizes (groups,)",
        **given,
    )
    require_floating(x=x, weights=weights)
    require(x.dtype == weights.dtype, "x and weights must have one type", x=x, weights=weights)
    require(group_sizes.dtype == torch.int64, "group_sizes must be int64", group_sizes=group_sizes)
    require_one_device(**given)


GROUPED_GEMM = register(
    Kernel(function=grouped_gemm, reference=grouped_gemm_reference, suite=SUITE, unsupported=wrong_dtype)
)
