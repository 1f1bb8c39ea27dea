"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), written out."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; float32 at least inside, x's type outside."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(compute)).to(x.dtype)
