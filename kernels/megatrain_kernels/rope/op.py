"""Rotary position embeddings of queries and keys together: the public function and its PyTorch operator."""

from typing import Any

import torch
from torch import Tensor

from megatrain_kernels.kernel import (
    Kernel,
    register,
    require,
    require_floating,
    require_one_device,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.rope.cases import SUITE
from megatrain_kernels.rope.reference import rotary_reference
from megatrain_kernels.rope.torch import torch_rotary


@torch.library.custom_op("megatrain::rotary", mutates_args=())
def rotary_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool, path: str) -> tuple[Tensor, Tensor]:
    """Rotate q and k, or rotate them back."""
    made: tuple[Tensor, Tensor] | None = run_triton(
        ROTARY, path, "rotate", q, k, cos, sin, back=back, kind=(q.dtype,)
    )
    return rotary_reference(q, k, cos, -sin if back else sin) if made is None else made


@rotary_op.register_fake
def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back, ctx.path = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """Rotate the gradients by the negative angle."""
    return *rotary_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.back, ctx.path), None, None, None, None


rotary_op.register_autograd(_differentiate, setup_context=_setup_context)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions (RoPE, arXiv 2104.09864).

    The pairs are (i, i + head_dim/2), as in Hugging Face's Llama.

    Args:
        q: `(batch, seq, heads, head_dim)`. k: `(batch, seq, kv_heads, head_dim)`.
        cos, sin: `(seq, head_dim/2)` or `(batch, seq, head_dim/2)`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check(q, k, cos, sin)
    path = select(ROTARY, backend, q)
    if path == "reference":
        return rotary_reference(q, k, cos, sin)
    if path == "torch":
        return torch_rotary(q, cos, sin), torch_rotary(k, cos, sin)
    rotated_q, rotated_k = rotary_op(q, k, cos, sin, False, path)
    return rotated_q, rotated_k


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    alike = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    rule = "q and k must be (batch, seq, heads, head_dim), alike but for heads, with an even head_dim"
    require(alike and q.shape[3] % 2 == 0, rule, q=q, k=k)
    table = (*q.shape[:2], q.shape[3] // 2)
    tables = cos.shape == sin.shape and tuple(cos.shape) in (table, table[1:])
    require(tables, f"cos and sin must be {table[1:]} or {table}", cos=cos, sin=sin)
    require_floating(q=q, k=k, cos=cos, sin=sin)
    require(q.dtype == k.dtype and cos.dtype == sin.dtype, "q and k, cos and sin must have one type each",
            q=q, k=k, cos=cos, sin=sin)  # fmt: skip
    require_one_device(q=q, k=k, cos=cos, sin=sin)


ROTARY = register(
    Kernel(
        function=rotary,
        reference=rotary_reference,
        suite=SUITE,
        unsupported=wrong_dtype,
        compiled="reference",
    )
)
