"""Cross entropy of rows of logits in PyTorch, a block of rows at a time; the vocabulary may be sharded.

The functions are those of `triton.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatrain_kernels.blocks import block_rows
from megatrain_kernels.xent.reference import LossOptions

SMALLEST = 1e-30
"""Probability below which its logarithm is inexact in float32, whose smallest normal number is 1.2e-38."""


class _Targets(NamedTuple):
    """Where each row's target is: its column in this shard, whether it is here, and whether the row counts at all."""

    column: Tensor
    here: Tensor
    valid: Tensor


def _locate(targets: Tensor, columns: int, options: LossOptions) -> _Targets:
    valid = targets != options.ignore_index
    first = options.first_token
    here = valid if options.group is None else valid & (targets >= first) & (targets < first + columns)
    return _Targets((targets - first).where(here, 0).unsqueeze(-1), here, valid)


def _widen(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if softcap is None else torch.tanh(wide / softcap).mul_(softcap)


def _rows_at_once(logits: Tensor) -> int:
    return block_rows(logits) if logits.device.type == "cpu" else max(1, logits.shape[0])


def partials(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return for each row of a shard the largest logit, the sum of exp(logit - largest) and the target's logit.

    `(3, rows)`; the target's logit is 0 where another shard has it.
    """
    located, rows = _locate(targets, logits.shape[1], options), _rows_at_once(logits)
    maxima, sums, picked = [], [], []
    for part, column in zip(logits.split(rows), located.column.split(rows), strict=True):
        wide = _widen(part, options.softcap)
        maxima.append(wide.amax(-1))
        picked.append(wide.gather(-1, column).squeeze(-1))
        sums.append(wide.sub(maxima[-1].unsqueeze(-1)).exp_().sum(-1))
    return torch.stack([torch.cat(maxima), torch.cat(sums), torch.cat(picked).where(located.here, 0.0)])


def _from_probabilities(p: Tensor, column: Tensor, valid: Tensor) -> Tensor | None:
    """Return -log p of each row's target, which saves two passes over the row; None where it would be inexact."""
    likelihood = p.gather(-1, column).squeeze(-1).where(valid, 1.0)
    return likelihood.log_().neg_() if bool(likelihood.amin() > SMALLEST) else None


def losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, whole: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Return the loss of each row, `(rows,)`, float32 at least, 0 where the target is ignored.

    Args:
        logits: `(rows, columns)`, this rank's columns of the vocabulary; targets: `(rows,)` ids in all of it.
        whole: `(2, rows)`, log-sum-exp and target logit over all shards; None: the columns are the vocabulary.
        gradient: filled with d(sum of losses)/d(logits), of logits' shape; may be `logits` itself.
    """
    rows = _rows_at_once(logits)
    located = _locate(targets, logits.shape[1], options)
    # On a CPU a look at the values costs nothing; a GPU would have to wait.
    is_plain = logits.device.type == "cpu" and not options.z_loss and not torch.compiler.is_compiling()
    found: list[Tensor] = []
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        column, here, valid = (t[block] for t in located)
        wide = _widen(logits[block], options.softcap)
        loss = lse = None
        if whole is None:
            p = torch.softmax(wide, dim=-1)
            loss = _from_probabilities(p, column, valid) if is_plain else None
        else:
            lse, picked = whole[:, block]
            p = torch.exp(wide - lse.unsqueeze(-1))
        if loss is None:
            if lse is None:
                picked = wide.gather(-1, column).squeeze(-1)
                lse = wide.amax(-1) - p.amax(-1).log_()  # the largest p is exp(largest logit - lse)
            loss = (lse - picked + options.z_loss * lse.square()).where(valid, 0.0)
        found.append(loss)
        if gradient is None:
            continue
        if is_plain:
            p.index_fill_(0, (~valid).nonzero().flatten(), 0.0)
        else:
            assert lse is not None
            p.mul_((1 + 2 * options.z_loss * lse).where(valid, 0.0).unsqueeze(-1))
        p.scatter_add_(-1, column, here.to(p.dtype).neg_().unsqueeze(-1))
        if options.softcap is not None:  # d cap(l) / dl = 1 - tanh(l / c)² = 1 - (capped / c)²
            p.mul_(1 - (wide / options.softcap).square_())
        gradient[block].copy_(p)
    wide_type = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat(found) if found else logits.new_zeros(0, dtype=wide_type)
