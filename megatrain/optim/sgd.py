"""Stochastic gradient descent with momentum, by PyTorch's implementation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from megatrain.optim.config import SGDConfig
from megatrain.optim.rule import Groups, OptimizerRule


def make(groups: Groups, cfg: SGDConfig) -> Optimizer:
    """Make the optimizer."""
    is_sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    # DTensors know no fused SGD (torch 2.13).
    return SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=not is_sharded)


def initial_state(parameter: nn.Parameter, group: dict[str, Any], cfg: SGDConfig) -> dict[str, Tensor]:
    """Return a zero momentum buffer, if there is momentum.

    torch's SGD starts from the first gradient; a zero buffer gives the same: momentum · 0 + gradient.
    """
    return {"momentum_buffer": torch.zeros_like(parameter)} if cfg.momentum > 0 else {}


RULE = OptimizerRule(make, initial_state)
