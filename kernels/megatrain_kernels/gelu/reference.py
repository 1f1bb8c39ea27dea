"""GELU of a sum with a bias (Hendrycks and Gimpel, arXiv 1606.08415), written out in its two forms."""

import math

import torch
from torch import Tensor


def bias_gelu_reference(x: Tensor, bias: Tensor, *, tanh: bool = True) -> Tensor:
    """Return gelu(x + bias), computed in float32 at least, in x's type; see `op.bias_gelu`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute) + bias.to(compute)
    if tanh:
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * wide * (1 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype)
