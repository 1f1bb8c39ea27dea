"""An exponential moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """average <- decay · average + (1 - decay) · weight, after every step, in the weights' own precision."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights of one more step."""
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [weights[name] for name in self.averages], 1 - self.decay)

    @torch.no_grad()
    def swap(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange the averages with `weights` in place, one tensor at a time; a second call undoes it exactly."""
        for name, average in self.averages.items():
            held = weights[name].detach().clone()
            weights[name].copy_(average)
            average.copy_(held)
