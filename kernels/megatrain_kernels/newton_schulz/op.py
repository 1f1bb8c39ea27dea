"""Orthogonalization of matrices by the Newton-Schulz iteration: the public function and its PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain_kernels.kernel import (
    Kernel,
    register,
    require,
    require_floating,
    run_triton,
    select,
    wrong_dtype,
)
from megatrain_kernels.newton_schulz.cases import SUITE
from megatrain_kernels.newton_schulz.reference import COEFFICIENTS, EPS, newton_schulz_reference


@torch.library.custom_op("megatrain::newton_schulz", mutates_args=())
def newton_schulz_op(x: Tensor, steps: int, path: str) -> Tensor:
    """Iterate on x `(batch, rows, cols)`, rows <= cols, with singular values up to 1; not differentiable."""
    made: Tensor | None = run_triton(ORTHOGONALIZE, path, "iterate", x, COEFFICIENTS, steps, kind=(x.dtype,))
    made = _iterate(x, steps) if made is None else made
    return made.clone() if made is x else made  # an operator's result is not its argument


@newton_schulz_op.register_fake
def _fake(x: Tensor, steps: int, path: str) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.megatrain.newton_schulz)
def _flops(x: Any, steps: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count the products as PyTorch makes them; the kernels compute half of the two symmetric ones."""
    batch, rows, cols = x
    return int(steps * batch * (4 * rows**2 * cols + 2 * rows**3))


def _iterate(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def iteration_dtype(x: Tensor) -> torch.dtype:
    """Return the type to iterate in: float64 stays, else bfloat16 on a GPU, which suffices, and float32 on a CPU."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def orthogonalize(update: Tensor, *, steps: int = 5, backend: str = "auto") -> Tensor:
    """Make each matrix of `update` `(..., rows, cols)` nearly orthogonal, as `newton_schulz_reference` defines it.

    The iteration runs on the shorter side and in `iteration_dtype`; "auto" takes Triton's kernel for its symmetric
    products on a GPU.

    Returns:
        A tensor of the type and shape of `update`; not differentiable through Triton.

    Raises:
        ValueError: no matrices, no floating type, or no backend of that name.
    """
    require(
        update.ndim >= 2,
        "only matrices can be made orthogonal: update must be (..., rows, cols)",
        update=update,
    )
    require_floating(update=update)
    path = select(ORTHOGONALIZE, backend, update)
    if path == "reference":
        return newton_schulz_reference(update, steps)
    if update.numel() == 0:
        return torch.zeros_like(update)
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).reshape(-1, min(update.shape[-2:]), max(update.shape[-2:]))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    x = (wide / norm).to(iteration_dtype(update))
    x = _iterate(x, steps) if path == "torch" else newton_schulz_op(x, steps, path)
    x = x.mT if tall else x
    return x.reshape(update.shape).to(update.dtype)


ORTHOGONALIZE = register(
    Kernel(function=orthogonalize, reference=newton_schulz_reference, suite=SUITE, unsupported=wrong_dtype)
)
