"""Losses of rows of logits and their gradient, a block of rows at a time; the vocabulary may be sharded."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from megatrain_kernels.blocks import block_rows


class LossOptions(NamedTuple):
    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None
    """Rank r of the group holds the r-th of equal slices of the vocabulary."""


class _Wanted(NamedTuple):
    """Where each row's target is: column in this shard, whether it is here, whether the row counts at all."""

    column: Tensor
    here: Tensor
    valid: Tensor


def _locate(targets: Tensor, columns: int, options: LossOptions) -> _Wanted:
    valid = targets != options.ignore_index
    first = 0 if options.group is None else dist.get_rank(options.group) * columns
    here = valid if options.group is None else valid & (targets >= first) & (targets < first + columns)
    return _Wanted((targets - first).where(here, 0).unsqueeze(-1), here, valid)


def _widen(logits: Tensor, softcap: float | None) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if softcap is None else torch.tanh(wide / softcap).mul_(softcap)


def _over_group(logits: Tensor, wanted: _Wanted, options: LossOptions, rows: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target logit of each row over all shards: one maximum and one sum are exchanged."""
    tops, sums, picked = [], [], []
    for part, column in zip(logits.split(rows), wanted.column.split(rows), strict=True):
        wide = _widen(part, options.softcap)
        tops.append(wide.amax(-1))
        picked.append(wide.gather(-1, column).squeeze(-1))
        sums.append(wide.sub(tops[-1].unsqueeze(-1)).exp_().sum(-1))
    local = torch.cat(tops)
    top = local.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, options.group)
    both = torch.stack([torch.cat(sums) * (local - top).exp(), torch.cat(picked).where(wanted.here, 0.0)])
    dist.all_reduce(both, group=options.group)
    return top + both[0].log(), both[1]


def row_losses(
    logits: Tensor, targets: Tensor, options: LossOptions, *, gradient: Tensor | None = None
) -> Tensor:
    """Loss of each row, `(tokens,)`, float32 at least, 0 where the target is ignored.

    Args:
        logits: `(tokens, vocab)`, or this rank's columns of it; targets: `(tokens,)` ids in the whole vocabulary.
        gradient: filled with d(sum of losses)/d(logits), of logits' shape; may be `logits` itself.
    """
    rows = block_rows(logits) if logits.device.type == "cpu" else max(1, logits.shape[0])
    wanted = _locate(targets, logits.shape[1], options)
    shared = None if options.group is None else _over_group(logits, wanted, options, rows)
    losses: list[Tensor] = []
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        column, here, valid = (t[block] for t in wanted)
        wide = _widen(logits[block], options.softcap)
        if shared is None:
            picked = wide.gather(-1, column).squeeze(-1)
            p = torch.softmax(wide, dim=-1)
            lse = wide.amax(-1) - p.amax(-1).log_()  # the largest p is exp(largest logit - lse)
        else:
            lse, picked = shared[0][block], shared[1][block]
            p = torch.exp(wide - lse.unsqueeze(-1))
        losses.append((lse - picked + options.z_loss * lse.square()).where(valid, 0.0))
        if gradient is None:
            continue
        p.mul_((1 + 2 * options.z_loss * lse).where(valid, 0.0).unsqueeze(-1))
        p.scatter_add_(-1, column, here.to(p.dtype).neg_().unsqueeze(-1))
        if options.softcap is not None:  # d cap(l) / dl = 1 - tanh(l / c)² = 1 - (capped / c)²
            p.mul_(1 - (wide / options.softcap).square_())
        gradient[block].copy_(p)
    return torch.cat(losses) if losses else logits.new_zeros(0, dtype=torch.float32)
