"""RMSNorm and LayerNorm: the public functions and the PyTorch operators that both share."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import (
    Kernel,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.norm.cases import LAYER_NORM_SUITE, RMS_NORM_SUITE
from megatrain_kernels.norm.reference import layer_norm_reference, rms_norm_reference
from megatrain_kernels.norm.torch import plain_norm, plain_norm_backward, torch_layer_norm, torch_rms_norm

LARGEST_ROW = 16384
"""Elements of a row that registers hold; longer ones take the PyTorch path."""


@torch.library.custom_op("megatrain::norm", mutates_args=())
def norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `triton.Normed` of x and residual `(rows, size)`; `centered` means LayerNorm."""
    made: tuple[Tensor, Tensor, Tensor, Tensor] | None = run_triton(
        LAYER_NORM if centered else RMS_NORM,
        path,
        "normalize",
        *(x, residual, weight, bias, eps),
        centered=centered,
        kind=(x.dtype, x.shape[-1]),
    )
    if made is None:
        return plain_norm(x, residual, weight, bias, eps, centered)
    out, total, mean, inverse = made
    return out, total, mean, inverse


@norm_op.register_fake
def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = (x.shape[0] if centered else 0, x.shape[0])
    mean, inverse = (x.new_empty(rows, dtype=torch.float32) for rows in stats)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, inverse


@torch.library.custom_op("megatrain::norm_backward", mutates_args=())
def norm_backward_op(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    biased: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; x is what was normalized. It was LayerNorm if there are means."""
    centered = mean.numel() > 0
    made: tuple[Tensor, Tensor, Tensor] | None = run_triton(
        LAYER_NORM if centered else RMS_NORM,
        path,
        "gradients",
        *(grad, grad_total, x, weight, mean, inverse),
        centered=centered,
        biased=biased,
        kind=(x.dtype, x.shape[-1]),
    )
    return plain_norm_backward(grad, grad_total, x, weight, mean, inverse, biased) if made is None else made


@norm_backward_op.register_fake
def _fake_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    biased: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_shape = weight.shape if biased else 0
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(bias_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, ctx.path = inputs
    _, total, mean, inverse = output
    ctx.added, ctx.biased = residual is not None, bias is not None
    ctx.save_for_backward(total if ctx.added else x, weight, mean, inverse)


def _differentiate(ctx: Any, grad: Tensor, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    made = norm_backward_op(grad, grad_total if ctx.added else None, *ctx.saved_tensors, ctx.biased, ctx.path)
    for_x, for_weight, for_bias = made
    # x and residual have the same gradient: one tensor, which autograd overwrites for neither.
    for_residual = for_x if ctx.added else None
    return for_x, for_residual, for_weight, for_bias if ctx.biased else None, None, None, None


norm_op.register_autograd(_differentiate, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply RMSNorm (arXiv 1910.07467) over the last dimension.

    Args:
        x: `(..., size)`. weight: `(size,)`.
        residual: of x's shape and type: added to x before the norm.

    Returns:
        The norm of x; or with `residual` (norm of x + residual, x + residual). In x's shape and type.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check(x, weight, residual=residual)
    path = select(RMS_NORM, backend, x)
    if path in ("triton", "triton_or_torch"):
        return _by_operator(x, residual, weight, None, eps, False, path)
    total = x if residual is None else x + residual
    out = (rms_norm_reference if path == "reference" else torch_rms_norm)(total, weight, eps)
    return out if residual is None else (out, total)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply LayerNorm (arXiv 1607.06450) over the last dimension.

    Args:
        x: `(..., size)`. weight, bias: `(size,)`.
        residual: of x's shape and type: added to x before the norm.

    Returns:
        The norm of x; or with `residual` (norm of x + residual, x + residual). In x's shape and type.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check(x, weight, bias=bias, residual=residual)
    mixed = weight.dtype == torch.float32 and x.itemsize == 2
    rule = "weight must have x's type, or float32 beside an x of 16 bits"
    require(weight.dtype == x.dtype or mixed, rule, x=x, weight=weight)
    path = select(LAYER_NORM, backend, x)
    if path in ("triton", "triton_or_torch"):
        return _by_operator(x, residual, weight, bias, eps, True, path)
    total = x if residual is None else x + residual
    out = (layer_norm_reference if path == "reference" else torch_layer_norm)(total, weight, bias, eps)
    return out if residual is None else (out, total)


def _by_operator(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    path: str,
) -> Tensor | tuple[Tensor, Tensor]:
    added = None if residual is None else _rows(residual)
    made, sums, _, _ = norm_op(_rows(x), added, weight, bias, eps, centered, path)
    return made.view(x.shape) if residual is None else (made.view(x.shape), sums.view(x.shape))


def _check(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    sizes = weight.shape == x.shape[-1:] and weight.ndim == 1 and (bias is None or bias.shape == weight.shape)
    require(sizes, "x must be (..., size), weight and bias (size,)", x=x, weight=weight, bias=bias)
    require_floating(**given)
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    require(same, "residual must have x's shape and type", x=x, residual=residual)
    one_type = bias is None or bias.dtype == weight.dtype
    require(one_type, "weight and bias must have one type", weight=weight, bias=bias)
    require_one_device(**given)


def _unsupported(x: Tensor) -> str | None:
    if x.shape[-1] > LARGEST_ROW:
        return f"rows of at most {LARGEST_ROW} elements, which registers hold; got {x.shape[-1]}"
    return wrong_dtype(x)


RMS_NORM = register(
    Kernel(
        function=rms_norm,
        reference=rms_norm_reference,
        suite=RMS_NORM_SUITE,
        unsupported=_unsupported,
        compiled="reference",
    )
)
LAYER_NORM = register(
    Kernel(
        function=layer_norm,
        reference=layer_norm_reference,
        suite=LAYER_NORM_SUITE,
        unsupported=_unsupported,
        compiled="reference",
    )
)
