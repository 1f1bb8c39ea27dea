"""Rotary position embeddings in PyTorch, a few sequences at a time on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from megatrain_kernels.blocks import BLOCK_ELEMENTS

_widened: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""cos -> number of heads -> tables of cos and sin with an entry for each head: all layers share a batch's angles."""


class Rotate(torch.autograd.Function):
    """Rotation that keeps cos and sin only: the gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x `(batch, seq, heads, dim)`."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient back."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def torch_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `(batch, seq, heads, dim)`, differentiably where gradients are wanted."""
    if torch.is_grad_enabled():
        rotated: Tensor = Rotate.apply(x, cos, sin)
        return rotated
    return _rotate(x, cos, sin, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate by `sign` times the angles, as many sequences at once as a CPU's cache holds; float32 at least inside."""
    batch, seq, heads, dim = x.shape
    half = dim // 2
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    several = max(1, BLOCK_ELEMENTS // max(1, seq * heads * dim)) if x.device.type == "cpu" else batch
    tables = _tables(cos, sin, heads, compute)
    for start in range(0, batch, max(1, several)):
        chosen = slice(start, start + several)
        c, s = (t[chosen] if t.dim() == 4 else t for t in tables)
        wide = x[chosen].to(compute)
        turned = torch.mul(wide, c, out=out[chosen] if compute == x.dtype else None)
        turned[..., :half].addcmul_(wide[..., half:], s, value=-sign)
        turned[..., half:].addcmul_(wide[..., :half], s, value=sign)
        if compute != x.dtype:
            out[chosen].copy_(turned)
    return out


def _tables(cos: Tensor, sin: Tensor, heads: int, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos (for both halves of a head) and sin with one entry for each head: long rows are the fast ones."""
    plain = type(cos) is Tensor  # others, such as fake tensors, hold no numbers
    keeps = plain and cos.device.type == "cpu" and not cos.is_inference()
    known: dict[Any, tuple[Tensor, Tensor]] = _widened.setdefault(cos, {}) if keeps else {}
    key = (heads, compute, cos._version, sin.data_ptr(), sin._version) if keeps else None
    if key not in known:
        both = torch.cat([cos, cos], -1)
        wide = (t.to(compute).unsqueeze(-2).repeat_interleave(heads, dim=-2) for t in (both, sin))
        known[key] = (next(wide), next(wide))
    return known[key]
