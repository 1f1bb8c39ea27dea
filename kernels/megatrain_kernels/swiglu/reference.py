"""SwiGLU (Shazeer, arXiv 2002.05202), written out."""

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate · sigmoid(gate) · up; float32 at least inside, gate's type outside."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(compute)
    return (wide * torch.sigmoid(wide) * up.to(compute)).to(gate.dtype)
