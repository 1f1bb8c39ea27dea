"""SwiGLU and GeGLU (Shazeer, arXiv 2002.05202), written out; GELU in its tanh form (arXiv 1606.08415)."""

import math

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate · sigmoid(gate) · up, computed in float32 at least, in gate's type."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(compute)
    return (wide * torch.sigmoid(wide) * up.to(compute)).to(gate.dtype)


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate · (1 + tanh(sqrt(2/π) · (gate + 0.044715 gate³))) / 2 · up, computed in float32 at least."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(compute)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner)) * up.to(compute)).to(gate.dtype)
