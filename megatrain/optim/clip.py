"""Clipping by the gradient norm of the full model."""

import torch
from torch import Tensor


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """Return the factor on all gradients, whose 2-norm together is `norm`, after which it is at most `max_norm`.

    Both are 0-d tensors on the gradients' device, which nobody waits for. None: nothing is scaled.
    """
    return None if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
