"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450), written out."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight over the last dimension.

    Computed in float32 at least; the result has x's type.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(compute)).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) · weight + bias over the last dimension.

    Computed in float32 at least; the result has x's type.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    return (out if bias is None else out + bias.to(compute)).to(x.dtype)
