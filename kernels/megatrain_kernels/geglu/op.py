"""GeGLU that keeps its two inputs only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain_kernels.backend import choose, wants_triton
from megatrain_kernels.gated_operator import activate, gated_op
from megatrain_kernels.geglu.reference import geglu_reference


class _GeGLU(torch.autograd.Function):
    """gelu(gate) is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return activate(gate, gelu=True).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return for_gate, activate(gate, gelu=True).mul_(grad)


def geglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(gate) · up with the tanh form of GELU, elementwise over equal shapes `(..., size)`."""
    chosen = choose(backend, ("torch", "triton", "reference"))
    if chosen == "reference":
        return geglu_reference(gate, up)
    if wants_triton(gate, backend):
        flat = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
        made: Tensor = gated_op(*flat, True, backend)
        return made.view(gate.shape)
    if torch.compiler.is_compiling():
        return activate(gate, gelu=True) * up
    out: Tensor = _GeGLU.apply(gate, up)
    return out
