"""Losses of rows of logits and their gradient in PyTorch, a block of rows at a time; the vocabulary may be sharded."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatrain_kernels.blocks import block_rows
from megatrain_kernels.cross_entropy.options import LossOptions


class _Wanted(NamedTuple):
    """Where each row's target is: column in this shard, whether it is here, whether the row counts at all."""

    column: Tensor
    here: Tensor
    valid: Tensor


def _locate(targets: Tensor, columns: int, options: LossOptions) -> _Wanted:
    valid = targets != options.ignore_index
    first = options.first(columns)
    here = valid if options.group is None else valid & (targets >= first) & (targets < first + columns)
    return _Wanted((targets - first).where(here, 0).unsqueeze(-1), here, valid)


def _widen(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if softcap is None else torch.tanh(wide / softcap).mul_(softcap)


def _rows_at_once(logits: Tensor) -> int:
    return block_rows(logits) if logits.device.type == "cpu" else max(1, logits.shape[0])


def partials(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Of each row of a shard: largest logit, sum of exp(logit - largest), target logit (0: elsewhere); `(3, rows)`."""
    wanted, rows = _locate(targets, logits.shape[1], options), _rows_at_once(logits)
    tops, sums, picked = [], [], []
    for part, column in zip(logits.split(rows), wanted.column.split(rows), strict=True):
        wide = _widen(part, options.softcap)
        tops.append(wide.amax(-1))
        picked.append(wide.gather(-1, column).squeeze(-1))
        sums.append(wide.sub(tops[-1].unsqueeze(-1)).exp_().sum(-1))
    return torch.stack([torch.cat(tops), torch.cat(sums), torch.cat(picked).where(wanted.here, 0.0)])


def losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, whole: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Loss of each row, `(rows,)`, float32 at least, 0 where the target is ignored.

    Args:
        logits: `(rows, columns)`, this rank's columns of the vocabulary; targets: `(rows,)` ids in all of it.
        whole: `(2, rows)`, log-sum-exp and target logit over all shards; None: the columns are the vocabulary.
        gradient: filled with d(sum of losses)/d(logits), of logits' shape; may be `logits` itself.
    """
    rows = _rows_at_once(logits)
    wanted = _locate(targets, logits.shape[1], options)
    found: list[Tensor] = []
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        column, here, valid = (t[block] for t in wanted)
        wide = _widen(logits[block], options.softcap)
        if whole is None:
            picked = wide.gather(-1, column).squeeze(-1)
            p = torch.softmax(wide, dim=-1)
            lse = wide.amax(-1) - p.amax(-1).log_()  # the largest p is exp(largest logit - lse)
        else:
            lse, picked = whole[:, block]
            p = torch.exp(wide - lse.unsqueeze(-1))
        found.append((lse - picked + options.z_loss * lse.square()).where(valid, 0.0))
        if gradient is None:
            continue
        p.mul_((1 + 2 * options.z_loss * lse).where(valid, 0.0).unsqueeze(-1))
        p.scatter_add_(-1, column, here.to(p.dtype).neg_().unsqueeze(-1))
        if options.softcap is not None:  # d cap(l) / dl = 1 - tanh(l / c)² = 1 - (capped / c)²
            p.mul_(1 - (wide / options.softcap).square_())
        gradient[block].copy_(p)
    wide_type = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat(found) if found else logits.new_zeros(0, dtype=wide_type)
