"""Loss heads of which each rank of a tensor-parallel group has a share of the rows: vocabulary or classes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from megatrain.nn.classifier import class_factors, multi_label_losses
from megatrain.nn.config import ClassifierConfig
from megatrain.parallel.collectives import Group, gather_from, gather_shared, sum_over
from megatrain.parallel.layout import share_of
from megatrain_kernels import linear_cross_entropy

SEQ = 1  # dimension of activations `(batch, seq, hidden)`


class VocabularyParallelLossHead(nn.Module):
    """An `nn.loss.LossHead` with a sharded vocabulary; logits are gathered only if requested."""

    def __init__(self, softcap: float | None, group: Group, tokens: int) -> None:
        super().__init__()
        self.softcap, self.group = softcap, group
        self.shares = [share_of(tokens, group.size(), rank) for rank in range(group.size())]

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        keep: Tensor | None = None,
        *,
        factors: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return what `LossHead` does, from hidden `(batch, seq / tp, hidden)` and this rank's rows of the weight."""
        hidden = gather_shared(hidden, SEQ, self.group)
        if targets is not None:
            return linear_cross_entropy(
                hidden,
                weight,
                targets,
                factors=factors,
                z_loss=z_loss,
                softcap=self.softcap,
                reduction="none" if per_token else "sum",
                tp_group=self.group,
                vocab_size=self.shares[-1].stop,
            )
        logits = _gather_columns(
            linear(hidden if keep is None else hidden[:, keep], weight), self.shares, self.group
        )
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class ClassParallelHead(nn.Module):
    """An `nn.classifier.ClassifierHead` with a share of the classes on each rank."""

    def __init__(self, cfg: ClassifierConfig, group: Group) -> None:
        super().__init__()
        self.is_multi_label, self.group = cfg.multi_label is True, group
        weights = cfg.class_weights
        self.class_weights = weights if isinstance(weights, tuple) else None
        self.shares = [share_of(cfg.n_classes, group.size(), rank) for rank in range(group.size())]

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        keep: Tensor | None = None,
        *,
        factors: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return what `ClassifierHead` does, from hidden `(batch, seq / tp, hidden)` and this rank's rows."""
        if targets is not None and self.is_multi_label:
            hidden = gather_from(hidden, SEQ, self.group)
            own, classes = self.shares[self.group.rank()], self.shares[-1].stop
            losses = multi_label_losses(
                hidden, weight, targets, own, class_weights=self.class_weights, n_classes=classes
            )
            losses = sum_over(losses, self.group)
            losses = losses if factors is None else losses * factors
            return losses if per_token else losses.sum()
        hidden = gather_shared(hidden, SEQ, self.group)
        if targets is None:
            logits = linear(hidden if keep is None else hidden[:, keep], weight)
            return _gather_columns(logits, self.shares, self.group)
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            factors=class_factors(targets, self.class_weights, factors),
            z_loss=z_loss,
            reduction="none" if per_token else "sum",
            tp_group=self.group,
            vocab_size=self.shares[-1].stop,
        )


def _gather_columns(logits: Tensor, shares: list[range], group: Group) -> Tensor:
    """Gather the columns of all ranks, of which the first ones may have one more than the others."""
    widest = len(shares[0])
    columns = gather_shared(pad(logits, (0, widest - logits.shape[-1])), logits.ndim - 1, group)
    parts = columns.split(widest, -1)
    return torch.cat([part[..., : len(share)] for part, share in zip(parts, shares, strict=True)], -1)
