"""GPTQ (arXiv 2210.17323): rounding one input after the other, with the error of each passed on to those after it."""

import torch
from torch import Tensor

from megatrain.compress.codes import Codes, Grid, round_to_nearest, squared_error

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it (section 3.3, step 3)."""
BLOCK = 128
"""Inputs whose errors are gathered before they are passed on to the rest (section 3.3, step 2)."""
SHRINKS = tuple(1 - step / 50 for step in range(18))
"""Factors on a group's scale that are tried: clipping its largest numbers makes the steps of the others smaller."""


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the Hessian that GPTQ inverts, of the sum of x xᵀ `(in, in)`: the factor 2 changes nothing."""
    mean = gram.diagonal().mean()
    added = torch.where(mean > 0, damping * mean, 1.0)
    return gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def fitted_scales(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """Return the scales `(out, groups)` under which rounding to nearest is wrong the least, group by group.

    The error is over the calibration tokens, `gram` `(in, in)`, with the other groups exact.
    """
    full = grid.scales(weight)
    groups = full.shape[-1]
    tiled = weight.unflatten(-1, (groups, -1))
    size = tiled.shape[-1]
    grams = torch.stack([gram[n * size : (n + 1) * size, n * size : (n + 1) * size] for n in range(groups)])
    best, least = full, torch.full_like(full, torch.inf, dtype=gram.dtype)
    for shrink in SHRINKS:
        scales = grid.stored(full * shrink)
        wrong = Codes(grid.round(weight, scales), scales, grid).numbers() - weight
        wrong = wrong.unflatten(-1, (groups, -1)).to(gram.dtype)
        error = (torch.einsum("ogi,gij->ogj", wrong, grams) * wrong).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def gptq(weight: Tensor, gram: Tensor, grid: Grid) -> Codes:
    """Quantize `weight` `(out, in)` for inputs with the sum of x xᵀ `gram` `(in, in)`, in float64.

    The scale of a group is fitted to its numbers as they stand when its turn comes. An output for which rounding to
    nearest is wrong less over these inputs keeps that: GPTQ looks only ahead.
    """
    simple = round_to_nearest(weight, grid)
    exact, gram = weight.double(), gram.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram)), upper=True)
    left = exact.clone()  # what is still to be rounded, with the errors so far taken into account
    n_inputs = weight.shape[1]
    size = grid.group or n_inputs
    codes = torch.empty_like(simple.values)
    chosen = torch.empty_like(simple.scales)
    for start in range(0, n_inputs, BLOCK):
        stop = min(start + BLOCK, n_inputs)
        errors = torch.zeros(len(weight), stop - start, dtype=torch.float64, device=weight.device)
        for column in range(start, stop):
            if column % size == 0:
                inputs = slice(column, column + size)
                # Inputs beyond this block have not got its errors yet.
                group = left[:, inputs].clone()
                if column + size > stop:
                    group[:, stop - column :] -= (
                        errors[:, : column - start] @ upper[start:column, stop : column + size]
                    )
                alone = Grid(grid.number, None, grid.scale_dtype)
                n = column // size
                chosen[:, n : n + 1] = fitted_scales(group, gram[inputs, inputs], alone)
            scale = chosen[:, column // size]
            values = grid.round(left[:, column : column + 1], scale[:, None])
            codes[:, column : column + 1] = values
            error = (left[:, column] - values[:, 0].double() * scale.double()) / upper[column, column]
            errors[:, column - start] = error
            left[:, column:stop] -= error[:, None] * upper[column, column:stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    found = Codes(codes, chosen, grid)
    worse = squared_error(found.numbers() - exact, gram) > squared_error(simple.numbers() - exact, gram)
    values = torch.where(worse[:, None], simple.values.float(), codes.float()).to(codes.dtype)
    return Codes(values, torch.where(worse[:, None], simple.scales, chosen), grid)
