"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), by PyTorch's fused kernel on the shards that a rank holds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megatrain.optim.config import AdamWConfig, MuonConfig
from megatrain.optim.rule import Groups, OptimizerRule
from megatrain.parallel.shards import local_tensor


class AdamW(Optimizer):
    """AdamW. State: `step`, `exp_avg`, `exp_avg_sq`.

    Not torch.optim.AdamW: on DTensors it goes through their dispatch, which takes seconds the first time and more time
    than the update itself later. The numbers are the same.
    """

    def __init__(self, groups: Groups, cfg: AdamWConfig) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        self.cfg = cfg

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            update(self, group, self.cfg)


def update(optimizer: Optimizer, group: dict[str, Any], cfg: AdamWConfig | MuonConfig) -> None:
    """Apply AdamW to the parameters of `group` that have a gradient."""
    held = [p for p in group["params"] if p.grad is not None]

    def states(key: str) -> list[Tensor]:
        return [local_tensor(optimizer.state[p][key]) for p in held]

    adamw(
        [local_tensor(p) for p in held],
        [local_tensor(p.grad) for p in held],
        states("exp_avg"),
        states("exp_avg_sq"),
        [],
        states("step"),
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        beta1=cfg.beta1,
        beta2=cfg.beta2,
        eps=cfg.eps,
    )


def initial_state(parameter: nn.Parameter, group: dict[str, Any], cfg: object) -> dict[str, Tensor]:
    """Return zero moments, sharded as the parameter is, and the step count."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


RULE = OptimizerRule(AdamW, initial_state)
