"""LayerNorm (Ba et al., arXiv 1607.06450), written out."""

import torch
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension; float32 at least inside."""
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    return (out if bias is None else out + bias.to(compute)).to(x.dtype)
