"""GeGLU (Shazeer, arXiv 2002.05202) with the tanh form of GELU (arXiv 1606.08415), written out."""

import math

import torch
from torch import Tensor


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate · (1 + tanh(sqrt(2/π) · (gate + 0.044715 gate³))) / 2 · up; float32 at least inside, gate's type outside."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(compute)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner)) * up.to(compute)).to(gate.dtype)
