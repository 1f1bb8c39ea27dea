"""GELU of a sum with a bias: the public function and its PyTorch operators."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from megatrain_kernels.gelu.cases import SUITE
from megatrain_kernels.gelu.reference import bias_gelu_reference
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


def _plain(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return gelu(x + bias, approximate="tanh" if tanh else "none")


@torch.library.custom_op("megatrain::bias_gelu", mutates_args=())
def bias_gelu_op(x: Tensor, bias: Tensor, tanh: bool, path: str) -> Tensor:
    """Return gelu(x + bias) of x `(rows, size)`."""
    made: Tensor | None = run_triton(
        BIAS_GELU, path, "bias_gelu_forward", x, bias, tanh=tanh, kind=(x.dtype,)
    )
    return _plain(x, bias, tanh) if made is None else made


@bias_gelu_op.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megatrain::bias_gelu_backward", mutates_args=())
def bias_gelu_backward_op(
    grad: Tensor, x: Tensor, bias: Tensor, tanh: bool, path: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, that of the bias summed in float32."""
    made: tuple[Tensor, Tensor] | None = run_triton(
        BIAS_GELU, path, "bias_gelu_backward", grad, x, bias, tanh=tanh, kind=(x.dtype,)
    )
    if made is not None:
        return made
    form = "tanh" if tanh else "none"
    for_x = torch.ops.aten.gelu_backward(grad.contiguous(), x + bias, approximate=form)
    return for_x, for_x.sum(0, dtype=torch.float32).to(bias.dtype)


@bias_gelu_backward_op.register_fake
def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *bias_gelu_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


bias_gelu_op.register_autograd(_differentiate, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor, *, tanh: bool = True, backend: str = "auto") -> Tensor:
    """Return gelu(x + bias) (GELU, arXiv 1606.08415) in x's shape and type.

    Args:
        x: `(..., size)`. bias: `(size,)`, in x's type.
        tanh: whether GELU is taken in its tanh form, as GPT-2's is, and not exactly.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    given = {"x": x, "bias": bias}
    require(x.shape[-1:] == bias.shape and bias.ndim == 1, "x must be (..., size) and bias (size,)", **given)
    require_floating(**given)
    require(x.dtype == bias.dtype, "x and bias must have one type", **given)
    require_one_device(**given)
    path = select(BIAS_GELU, backend, x)
    if path == "reference":
        return bias_gelu_reference(x, bias, tanh=tanh)
    if path == "torch":
        return _plain(x, bias, tanh)
    made: Tensor = bias_gelu_op(x.reshape(-1, x.shape[-1]), bias, tanh, path)
    return made.view(x.shape)


BIAS_GELU = register(
    Kernel(
        function=bias_gelu,
        reference=bias_gelu_reference,
        suite=SUITE,
        unsupported=wrong_dtype,
        compiled="reference",
    )
)
