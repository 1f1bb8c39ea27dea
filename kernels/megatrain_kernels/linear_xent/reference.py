"""Linear layer and cross entropy, written out with all logits."""

import torch
from torch import Tensor

from megatrain_kernels.xent.reference import cross_entropy_reference


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    factors: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return `cross_entropy_reference` of logits = x weightᵀ: the loss of each token, `(...)`, float32 at least.

    Each is multiplied by its entry of `factors` `(...)`, if given.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(compute) @ weight.to(compute).T
    losses = cross_entropy_reference(
        logits, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
    )
    return losses if factors is None else losses * factors.to(losses.dtype)
