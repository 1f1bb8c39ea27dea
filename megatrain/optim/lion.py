"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatrain.optim.config import LionConfig
from megatrain.optim.rule import OptimizerRule
from megatrain.parallel.shards import local_tensor


class Lion(Optimizer):
    """Lion: weight -= lr · (sign(beta1 · m + (1 - beta1) · gradient) + weight_decay · weight), then
    m = beta2 · m + (1 - beta2) · gradient. State: `exp_avg`, which is m."""

    def __init__(self, groups: list[dict[str, Any]], cfg: LionConfig) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        self.cfg = cfg

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            weights, gradients = [local_tensor(p) for p in held], [local_tensor(p.grad) for p in held]
            averages = [local_tensor(self.state[p]["exp_avg"]) for p in held]
            updates = torch._foreach_lerp(averages, gradients, 1 - self.cfg.beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - self.cfg.beta2)


def initial_state(parameter: nn.Parameter, group: dict[str, Any], cfg: LionConfig) -> dict[str, Tensor]:
    """Return a zero momentum, sharded as the parameter is."""
    return {"exp_avg": torch.zeros_like(parameter)}


RULE = OptimizerRule(Lion, initial_state)
