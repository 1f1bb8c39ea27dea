"""Cross entropy with z-loss and soft-cap, written out, and the options that every path of it takes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class LossOptions(NamedTuple):
    """The options of one call, as `linear_cross_entropy` documents them."""

    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None
    """Each of its ranks holds a slice of the vocabulary."""
    first_token: int = 0
    """The token of the first of this rank's columns."""


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the loss of each token, `(...)`, 0 where the target is `ignore_index`; float32 at least.

    logits `(..., vocab)` are capped to softcap · tanh(logits / softcap) (Gemma 2, arXiv 2408.00118); loss =
    lse - logits[target] + z_loss · lse², lse their log-sum-exp (z-loss: PaLM, arXiv 2204.02311, section 5).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(-1, targets.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    return (lse - picked + z_loss * lse.square()).where(valid, 0.0)


def reduce_loss(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Return the mean over the valid tokens (0 if there is none), the sum, or with "none" the losses themselves.

    Raises:
        ValueError: there is no reduction of that name.
    """
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be mean, sum or none")
    total = losses.sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total
