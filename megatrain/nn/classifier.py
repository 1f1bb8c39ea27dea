"""The loss head of a classifier. A document's labels are the target of its last token: one, or bits of an integer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from megatrain.nn.config import ClassifierConfig
from megatrain_kernels import linear_cross_entropy


class ClassifierHead(nn.Module):
    """Hidden states to the logits of classes, or to the loss of those tokens that have labels."""

    def __init__(self, cfg: ClassifierConfig) -> None:
        super().__init__()
        self.is_multi_label = cfg.multi_label is True
        weights = cfg.class_weights
        self.class_weights = weights if isinstance(weights, tuple) else None

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
        """Return logits `(batch, seq, classes)`, or the loss as `LossHead` does, from `weight` `(classes, hidden)`.

        With several labels a token's loss is the mean of the classes' binary cross entropies; there is no z-loss.
        """
        if targets is None:
            return linear(hidden if keep is None else hidden[:, keep], weight)
        if self.is_multi_label:
            losses = multi_label_losses(
                hidden, weight, targets, range(len(weight)), class_weights=self.class_weights
            )
            losses = losses if factors is None else losses * factors
            return losses if per_token else losses.sum()
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            factors=class_factors(targets, self.class_weights, factors),
            z_loss=z_loss,
            reduction="none" if per_token else "sum",
        )


def class_factors(
    targets: Tensor, class_weights: tuple[float, ...] | None, factors: Tensor | None
) -> Tensor | None:
    """Return `factors`, if any, times the weight of the class of each target, if there are such weights."""
    if class_weights is None:
        return factors
    weights = torch.tensor(class_weights, dtype=torch.float64, device=targets.device)[targets.clamp(min=0)]
    return weights if factors is None else weights * factors


def multi_label_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    classes: range,
    *,
    class_weights: tuple[float, ...] | None,
    n_classes: int | None = None,
) -> Tensor:
    """Return each token's binary cross entropies, summed over `classes` and divided by `n_classes`; float32 at least.

    Args:
        hidden: `(batch, seq, hidden)`. weight: `(len(classes), hidden)`, the rows of these classes.
        targets: `(batch, seq)` int64: bit c says whether a token has label c; negative: it has no loss.
        class_weights: factors on the terms of positive labels, of all classes.
        n_classes: of which `classes` may be a part; None: there are no others.
    """
    logits = linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    numbers = torch.arange(classes.start, classes.stop, device=targets.device)
    positive = ((targets.unsqueeze(-1) >> numbers) & 1).to(logits.dtype)
    scale = positive
    if class_weights is not None:
        own = class_weights[classes.start : classes.stop]
        scale = positive * torch.tensor(own, dtype=logits.dtype, device=logits.device)
    terms = scale * softplus(-logits) + (1 - positive) * softplus(logits)
    return terms.sum(-1) * (targets >= 0) / (n_classes or len(classes))


def chosen_labels(logits: Tensor, *, is_multi: bool) -> Tensor:
    """Return the labels that logits `(..., classes)` choose, `(...)` int64, in the form of targets."""
    if not is_multi:
        return logits.argmax(-1)
    bits = 1 << torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > 0) * bits).sum(-1)
