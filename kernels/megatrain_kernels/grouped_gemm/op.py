"""Grouped products as PyTorch operators with both gradients: torch's grouped product, Triton, or a loop.

The operators are opaque to torch.compile, know their shapes without data, and state their FLOPs.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.backend import choose, interpreting, preferred, triton_runs_on
from megatrain_kernels.grouped_gemm.reference import grouped_gemm_reference

KNOWN = (torch.bfloat16, torch.float16, torch.float32)


def _fused(*tensors: Tensor) -> bool:
    """Does torch's grouped product take them? Its rows must begin at multiples of 16 bytes."""
    return tensors[0].dtype in KNOWN and all(
        _row_step(t) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _takes_triton(x: Tensor) -> bool:
    here = triton_runs_on(x) or (x.device.type == "cpu" and interpreting())
    return here and x.dtype in KNOWN


def _triton(backend: str, *tensors: Tensor) -> Any:
    """The module of kernels where they are to run, else None: by name, since a CPU machine may lack triton.

    On a GPU torch's own product is a kernel in bf16 only; in other types it is a loop that waits for the sizes.
    """
    x = tensors[0]
    own = x.dtype == torch.bfloat16 and _fused(*tensors)
    if backend == "triton" or (backend == "auto" and triton_runs_on(x) and x.dtype in KNOWN and not own):
        return import_module("megatrain_kernels.grouped_gemm.triton")
    return None


def _row_step(t: Tensor) -> int:
    return max(t.stride()[-2:])


def _ends(group_sizes: Tensor) -> Tensor:
    return group_sizes.cumsum(0).to(torch.int32)


def _dense(t: Tensor) -> Tensor:
    """As it is if its matrices are stored row by row or column by column, else a copy. (A gradient may be a view in
    which all elements are one.)"""
    rows = t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1]
    columns = t.stride(-2) == 1 and t.stride(-1) >= t.shape[-2]
    return t if rows or columns else t.contiguous()


@torch.library.custom_op("megatrain::grouped_gemm", mutates_args=())
def grouped_gemm_op(x: Tensor, weights: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    """x_g weights_gᵀ; see `grouped_gemm`."""
    x, weights = _dense(x), _dense(weights)
    if (kernels := _triton(backend, x, weights)) is not None:
        made: Tensor = kernels.rows_product(x, weights, group_sizes)
        return made
    if _fused(x, weights):
        return grouped_mm(x, weights.mT, offs=_ends(group_sizes))
    out = x.new_empty(x.shape[0], weights.shape[1])
    sizes = group_sizes.tolist()
    for rows, weight, result in zip(x.split(sizes), weights, out.split(sizes), strict=True):
        torch.mm(rows, weight.T, out=result)
    return out


@torch.library.custom_op("megatrain::grouped_outer", mutates_args=())
def grouped_outer_op(a: Tensor, b: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    """a_gᵀ b_g of each group of rows: `(tokens, m)` and `(tokens, n)` to `(groups, m, n)`; empty groups give 0."""
    a, b = _dense(a), _dense(b)
    if (kernels := _triton(backend, a, b)) is not None:
        made: Tensor = kernels.outer_product(a, b, group_sizes)
        return made
    if _fused(a, b):
        return grouped_mm(a.T, b, offs=_ends(group_sizes))
    out = a.new_empty(len(group_sizes), a.shape[1], b.shape[1])
    sizes = group_sizes.tolist()
    for left, right, result in zip(a.split(sizes), b.split(sizes), out, strict=True):
        torch.mm(left.T, right, out=result)
    return out


@grouped_gemm_op.register_fake
def _fake(x: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@grouped_outer_op.register_fake
def _fake_outer(a: Tensor, b: Tensor, group_sizes: Tensor, *_: Any) -> Tensor:
    return a.new_empty(group_sizes.shape[0], a.shape[1], b.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, sizes = ctx.saved_tensors
    for_x = grouped_gemm_op(grad, weights.mT, sizes, ctx.backend) if ctx.needs_input_grad[0] else None
    for_weights = grouped_outer_op(grad, x, sizes, ctx.backend) if ctx.needs_input_grad[1] else None
    return for_x, for_weights, None, None


grouped_gemm_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.megatrain.grouped_gemm)
def _flops(x: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * x[0] * x[1] * weights[1])


@register_flop_formula(torch.ops.megatrain.grouped_outer)
def _outer_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def grouped_gemm(x: Tensor, weights: Tensor, group_sizes: Tensor, *, backend: str = "auto") -> Tensor:
    """Products of uneven groups of rows, each with its own matrix: x_g weights_gᵀ.

    Args:
        x: `(tokens, in)`, sorted by group. weights: `(groups, out, in)`.
        group_sizes: `(groups,)` int64 on x's device, 0 allowed; the sum is the number of tokens.

        backend: "auto" takes torch's grouped product where it is one kernel or on a CPU, and Triton elsewhere.

    Returns:
        `(tokens, out)` in x's type.

    Raises:
        ValueError: no backend of that name, or it cannot take these inputs.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weights = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weights))
    backend = preferred(backend)
    choose(backend, ("torch", "triton", "reference"))
    if backend == "reference":
        return grouped_gemm_reference(x, weights, group_sizes)
    if backend == "triton" and not _takes_triton(x):
        raise ValueError(
            f"backend='triton' needs a CUDA device and float16, bfloat16 or float32; got {x.device.type}, {x.dtype}"
        )
    out: Tensor = grouped_gemm_op(x, weights, group_sizes, backend)
    return out
