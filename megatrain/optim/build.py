"""Construction of a torch optimizer from its config; its state exists from the start."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from megatrain.nn.contract import Role
from megatrain.optim import adamw, lion, muon, sgd
from megatrain.optim.config import OptimConfig
from megatrain.optim.groups import parameter_groups
from megatrain.parallel.sharding import Split

RULES = {"adamw": adamw.RULE, "sgd": sgd.RULE, "muon": muon.RULE, "lion": lion.RULE}
"""`optim.kind` -> the optimizer."""


def build_optimizer(
    cfg: OptimConfig,
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    splits: Mapping[str, Split] | None = None,
) -> Optimizer:
    """Make the optimizer of `parameters` (canonical name -> float32 or float64 master weight).

    Its state tensors are made at once, so that a checkpoint has the same keys before and after the first step.

    Args:
        splits: this rank's part of the parameters that are sharded unevenly.
    """
    rule = RULES[cfg.kind]
    groups = parameter_groups(parameters, roles, cfg)
    names = {parameter: name for name, parameter in parameters.items()}
    for group in groups:
        group["splits"] = [(splits or {}).get(names[parameter]) for parameter in group["params"]]
    optimizer = rule.make(groups, cfg)
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
