"""Rotary position embeddings (Su et al., arXiv 2104.09864), written out."""

import torch
from torch import Tensor


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k rotated; see `op.rotary`."""
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + dim/2]) of x `(batch, seq, heads, dim)` by the angles of cos and sin.

    cos, sin: `(seq, dim/2)` or `(batch, seq, dim/2)`. Computed in float32 at least; the result has x's type.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(compute).chunk(2, dim=-1)
    c, s = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)
