"""Rotary positions as a PyTorch operator over Triton's kernel, or plain PyTorch where it does not compile.

The operator is opaque to torch.compile and knows its shapes without data.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.backend import try_triton
from megatrain_kernels.rotary.reference import rotary_reference


@torch.library.custom_op("megatrain::rotary", mutates_args=())
def rotary_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k turned, or turned back."""
    # By name: the module needs triton, which a CPU machine may lack.
    call = partial(import_module("megatrain_kernels.rotary.triton").turn, q, k, cos, sin, back=back)
    made: tuple[Tensor, Tensor] | None = try_triton(("rotary", q.dtype), call, backend=backend)
    if made is not None:
        return made
    turn = -sin if back else sin
    return rotary_reference(q, cos, turn), rotary_reference(k, cos, turn)


@rotary_op.register_fake
def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is the rotation by the negative angle."""
    return *rotary_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.back, ctx.backend), None, None, None, None


rotary_op.register_autograd(_differentiate, setup_context=_setup_context)
