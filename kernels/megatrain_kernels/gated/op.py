"""SwiGLU and GeGLU: the public functions and the PyTorch operators that both share."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.gated.cases import SUITE
from megatrain_kernels.gated.reference import geglu_reference, swiglu_reference
from megatrain_kernels.gated.torch import GeGLU, SwiGLU, activate
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


@torch.library.custom_op("megatrain::gated", mutates_args=())
def gated_op(gate: Tensor, up: Tensor, gelu: bool, path: str) -> Tensor:
    """Return act(gate) · up of `(rows, size)`."""
    kernel = GEGLU if gelu else SWIGLU
    made: Tensor | None = run_triton(kernel, path, "gated_forward", gate, up, gelu=gelu, kind=(gate.dtype,))
    return activate(gate, gelu=gelu).mul_(up) if made is None else made


@gated_op.register_fake
def _fake(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("megatrain::gated_backward", mutates_args=())
def gated_backward_op(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool, path: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    kernel = GEGLU if gelu else SWIGLU
    made: tuple[Tensor, Tensor] | None = run_triton(
        kernel, path, "gated_backward", grad, gate, up, gelu=gelu, kind=(gate.dtype,)
    )
    if made is not None:
        return made
    aten, above = torch.ops.aten, grad * up
    for_gate = (
        aten.gelu_backward(above, gate, approximate="tanh") if gelu else aten.silu_backward(above, gate)
    )
    return for_gate, activate(gate, gelu=gelu).mul_(grad)


@gated_backward_op.register_fake
def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.options = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


gated_op.register_autograd(_differentiate, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return silu(gate) · up (SwiGLU, arXiv 2002.05202), elementwise over equal shapes `(..., size)`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check(gate, up)
    path = select(SWIGLU, backend, gate)
    if path == "reference":
        return swiglu_reference(gate, up)
    rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    made: Tensor = SwiGLU.apply(*rows) if path == "torch" else gated_op(*rows, False, path)
    return made.view(gate.shape)


def geglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return gelu(gate) · up (GeGLU, arXiv 2002.05202) with the tanh form of GELU, over equal shapes `(..., size)`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check(gate, up)
    path = select(GEGLU, backend, gate)
    if path == "reference":
        return geglu_reference(gate, up)
    if path == "torch":
        out: Tensor = GeGLU.apply(gate, up)
        return out
    made: Tensor = gated_op(*(t.reshape(-1, t.shape[-1]) for t in (gate, up)), True, path)
    return made.view(gate.shape)


def _check(gate: Tensor, up: Tensor) -> None:
    given = {"gate": gate, "up": up}
    require(gate.ndim > 0 and gate.shape == up.shape, "gate and up must have one shape (..., size)", **given)
    require_floating(**given)
    require(gate.dtype == up.dtype, "gate and up must have one type", **given)
    require_one_device(**given)


SWIGLU = register(
    Kernel(
        function=swiglu,
        reference=swiglu_reference,
        suite=SUITE,
        unsupported=wrong_dtype,
        compiled="reference",
    )
)
GEGLU = register(
    Kernel(
        function=geglu,
        reference=geglu_reference,
        suite=SUITE,
        unsupported=wrong_dtype,
        compiled="reference",
    )
)
