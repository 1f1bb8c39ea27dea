"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), by PyTorch's fused implementation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megatrain.optim.config import AdamWConfig
from megatrain.optim.rule import Groups, OptimizerRule


def make(groups: Groups, cfg: AdamWConfig) -> Optimizer:
    """Make the optimizer."""
    return AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def initial_state(parameter: nn.Parameter, group: dict[str, Any], cfg: object) -> dict[str, Tensor]:
    """Return zero moments, sharded as the parameter is, and the step count."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


RULE = OptimizerRule(make, initial_state)
