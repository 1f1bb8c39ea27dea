"""From the optimizer's config to a torch optimizer whose state exists from the start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from megatrain.optim.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig
from megatrain.optim.groups import parameter_groups
from megatrain.optim.lion import Lion
from megatrain.optim.muon import Muon


def build_optimizer(cfg: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer of `parameters` (canonical name -> float32 or float64 master weight).

    Its state tensors are made at once, so that a checkpoint has the same keys before and after the first step.
    """
    optimizer = _make(cfg, parameter_groups(parameters, cfg))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _initial_state(cfg, parameter, orthogonal=group["orthogonal"])
    return optimizer


def _make(cfg: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    if isinstance(cfg, AdamWConfig):
        return AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    if isinstance(cfg, MuonConfig):
        return Muon(groups, cfg)
    if isinstance(cfg, LionConfig):
        return Lion(groups, cfg)
    is_cut = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    # DTensors know no fused SGD (torch 2.13).
    return SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=not is_cut)


def _initial_state(cfg: OptimConfig, parameter: nn.Parameter, *, orthogonal: bool) -> dict[str, Tensor]:
    if isinstance(cfg, AdamWConfig) or (isinstance(cfg, MuonConfig) and not orthogonal):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if isinstance(cfg, LionConfig):
        return {"exp_avg": torch.zeros_like(parameter)}
    if isinstance(cfg, MuonConfig) or cfg.momentum > 0:
        # torch's SGD starts from the first gradient; a zero buffer gives the same: momentum · 0 + gradient.
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {}


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by canonical name: `<parameter>.<state>` -> tensor (no copy)."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
