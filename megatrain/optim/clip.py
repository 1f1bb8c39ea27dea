"""Clipping by the gradient norm of the full model."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatrain.parallel.shards import local_tensor


@torch.no_grad()
def clip_gradients(gradients: Iterable[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Scale `gradients` in place so that the 2-norm of all of them, which is `norm`, is at most `max_norm`.

    `norm` is a 0-d tensor on the gradients' device. None: nothing is scaled.
    """
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
