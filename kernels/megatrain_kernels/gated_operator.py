"""act(gate) · up as PyTorch operators over Triton's kernels, or plain PyTorch where they do not compile.

The operators are opaque to torch.compile and know their shapes without data.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain_kernels.backend import try_triton


def activate(gate: Tensor, *, gelu: bool) -> Tensor:
    """silu, or tanh GELU."""
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


@torch.library.custom_op("megatrain::gated", mutates_args=())
def gated_op(gate: Tensor, up: Tensor, gelu: bool, backend: str) -> Tensor:
    """act(gate) · up of `(rows, size)`."""
    # By name: the module needs triton, which a CPU machine may lack.
    call = partial(import_module("megatrain_kernels.gated").gated_forward, gate, up, gelu=gelu)
    made: Tensor | None = try_triton(("gated", "forward", gate.dtype, gelu), call, backend=backend)
    return activate(gate, gelu=gelu).mul_(up) if made is None else made


@gated_op.register_fake
def _fake(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("megatrain::gated_backward", mutates_args=())
def gated_backward_op(
    grad: Tensor, gate: Tensor, up: Tensor, gelu: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    call = partial(import_module("megatrain_kernels.gated").gated_backward, grad, gate, up, gelu=gelu)
    made: tuple[Tensor, Tensor] | None = try_triton(
        ("gated", "backward", gate.dtype, gelu), call, backend=backend
    )
    if made is not None:
        return made
    above = grad * up
    backward = torch.ops.aten
    for_gate = (
        backward.gelu_backward(above, gate, approximate="tanh")
        if gelu
        else backward.silu_backward(above, gate)
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
