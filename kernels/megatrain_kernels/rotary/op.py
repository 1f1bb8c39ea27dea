"""Rotary positions for queries and keys together."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.backend import choose
from megatrain_kernels.rotary.reference import rotary_reference


class _Rotate(torch.autograd.Function):
    """Few passes over memory: cos and sin are widened once, and the gradient is the rotation by -angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, c, out=out[..., :half]).addcmul_(second, s, value=-1)
    torch.mul(second, c, out=out[..., half:]).addcmul_(first, s)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Turn q and k `(batch, seq, heads, head_dim)`; cos and sin `(seq, head_dim/2)` or `(batch, seq, head_dim/2)`.

    The pairs are (i, i + head_dim/2), as in Hugging Face's Llama.
    """
    if choose(backend) == "reference":
        return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]
