"""Rotary position embeddings in PyTorch, a few sequences at a time on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain_kernels.blocks import BLOCK_ELEMENTS


class Rotate(torch.autograd.Function):
    """Rotation that keeps cos and sin only: the gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x `(batch, seq, heads, dim)`."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient back."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as many sequences at once as a CPU's cache holds; float32 at least inside."""
    batch, seq, heads, dim = x.shape
    half = dim // 2
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    several = max(1, BLOCK_ELEMENTS // max(1, seq * heads * dim)) if x.device.type == "cpu" else batch
    tables: list[Tensor] = []
    for start in range(0, batch, max(1, several)):
        chosen = slice(start, start + several)
        if not tables or cos.dim() == 3:  # one entry for each head: long rows are the fast ones
            c, s = (t[chosen] if t.dim() == 3 else t for t in (cos, sin))
            both = torch.cat([c, c], -1).to(compute)
            tables = [t.to(compute).unsqueeze(-2).repeat_interleave(heads, dim=-2) for t in (both, s)]
        wide = x[chosen].to(compute)
        turned = wide * tables[0]
        turned[..., :half].addcmul_(wide[..., half:], tables[1], value=-1)
        turned[..., half:].addcmul_(wide[..., :half], tables[1])
        out[chosen].copy_(turned)
    return out
