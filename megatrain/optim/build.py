"""From the optimizer's config to a torch optimizer whose state exists from the start."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from megatrain.optim.config import AdamWConfig, OptimConfig, SGDConfig
from megatrain.optim.groups import parameter_groups


def build_optimizer(cfg: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer of `parameters` (canonical name -> float32 or float64 master weight).

    Its state tensors are made at once, so that a checkpoint has the same keys before and after the first step.
    """
    groups = parameter_groups(parameters, cfg)
    if isinstance(cfg, AdamWConfig):
        betas = (cfg.beta1, cfg.beta2)
        optimizer: Optimizer = AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    else:
        optimizer = SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)
    for parameter in parameters.values():
        optimizer.state[parameter] = _initial_state(cfg, parameter)
    return optimizer


def _initial_state(cfg: OptimConfig, parameter: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(cfg, AdamWConfig):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if isinstance(cfg, SGDConfig) and cfg.momentum > 0:
        # torch starts from the first gradient; a zero buffer gives the same: momentum · 0 + gradient.
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {}


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by canonical name: `<parameter>.<state>` -> tensor (no copy)."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
