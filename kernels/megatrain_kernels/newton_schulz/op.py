"""Orthogonalization of matrices by the Newton-Schulz iteration."""

from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from megatrain_kernels.backend import choose, try_triton, wants_triton
from megatrain_kernels.newton_schulz.reference import COEFFICIENTS, EPS, newton_schulz_reference


def iteration_dtype(x: Tensor) -> torch.dtype:
    """float64 stays; else bfloat16 on a GPU, which the iteration forgives, and float32 on a CPU."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def orthogonalize(update: Tensor, *, steps: int = 5, backend: str = "auto") -> Tensor:
    """`reference.newton_schulz_reference` of each matrix of `update` `(..., rows, cols)`, in its type and shape.

    The iteration runs on the shorter side and in `iteration_dtype`; "auto" takes Triton's kernel for its symmetric
    products on a GPU.

    Raises:
        ValueError: not a matrix, or no backend of that name.
    """
    if update.ndim < 2:
        raise ValueError(f"only matrices can be made orthogonal; got the shape {tuple(update.shape)}")
    if choose(backend, ("torch", "triton", "reference")) == "reference":
        return newton_schulz_reference(update, steps)
    by_triton = update.dtype != torch.float64 and wants_triton(update, backend)
    if update.numel() == 0:
        return torch.zeros_like(update)
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).reshape(-1, min(update.shape[-2:]), max(update.shape[-2:]))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    x = (wide / norm).to(iteration_dtype(update))
    x = _by_triton(x, steps, backend) if by_triton else _iterate(x, steps)
    x = x.mT if tall else x
    return x.reshape(update.shape).to(update.dtype)


def _by_triton(x: Tensor, steps: int, backend: str) -> Tensor:
    # By name: the module needs triton, which a CPU machine may lack.
    iterate = import_module("megatrain_kernels.newton_schulz.triton").iterate
    call = partial(iterate, x, COEFFICIENTS, steps)
    made: Tensor | None = try_triton(("newton_schulz", x.dtype), call, backend=backend)
    return _iterate(x, steps) if made is None else made


def _iterate(x: Tensor, steps: int) -> Tensor:
    """x `(batch, rows, cols)` with singular values up to 1."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
