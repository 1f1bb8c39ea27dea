"""Construction of a torch optimizer from its config; its state exists from the start."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from megatrain.nn.contract import Role
from megatrain.optim import adamw, lion, muon, sgd
from megatrain.optim.config import OptimConfig
from megatrain.optim.groups import parameter_groups

RULES = {"adamw": adamw.RULE, "sgd": sgd.RULE, "muon": muon.RULE, "lion": lion.RULE}
"""`optim.kind` -> the optimizer."""


def build_optimizer(
    cfg: OptimConfig, parameters: Mapping[str, nn.Parameter], roles: Mapping[str, Role]
) -> Optimizer:
    """Make the optimizer of `parameters` (canonical name -> float32 or float64 master weight).

    Its state tensors are made at once, so that a checkpoint has the same keys before and after the first step.
    """
    rule = RULES[cfg.kind]
    optimizer = rule.make(parameter_groups(parameters, roles, cfg), cfg)
    start_state(optimizer, cfg)
    return optimizer


def start_state(optimizer: Optimizer, cfg: OptimConfig) -> None:
    """Give the present parameters of `optimizer` the state before the first step, and forget all others'."""
    rule = RULES[cfg.kind]
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = rule.initial_state(parameter, group, cfg)


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizer's state by canonical name: `<parameter>.<state>` -> tensor (no copy)."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
