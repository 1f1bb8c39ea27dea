"""Construction of a torch optimizer from its config; its state exists from the start."""

from collections.abc import Mapping

from torch import Tensor, nn

from megatrain.nn.contract import Role
from megatrain.optim import adamw, lion, muon, sgd
from megatrain.optim.config import OptimConfig
from megatrain.optim.groups import parameter_groups
from megatrain.optim.rule import Facts, Updater
from megatrain.optim.step import PLAIN, place_of
from megatrain.parallel.sharding import Split
from megatrain.parallel.shards import shard_of
from megatrain.runtime.rng import stream_key

RULES = {"adamw": adamw.RULE, "sgd": sgd.RULE, "muon": muon.RULE, "lion": lion.RULE}
"""`optim.kind` -> the optimizer."""


def build_optimizer(
    cfg: OptimConfig,
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    splits: Mapping[str, Split] | None = None,
    *,
    copies: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Updater:
    """Make the optimizer of `parameters` (canonical name -> float32 or float64 master weight).

    Its state tensors are made at once, so that a checkpoint has the same keys before and after the first step.

    Args:
        splits: this rank's part of the parameters that are sharded unevenly.
        copies: the model's own weights, where the parameters are masters in another type.
        seed: of stochastic rounding.
    """
    rule = RULES[cfg.kind]
    groups = parameter_groups(parameters, roles, cfg)
    names = {parameter: name for name, parameter in parameters.items()}
    for group in groups:
        group["splits"] = [(splits or {}).get(names[parameter]) for parameter in group["params"]]
    optimizer = rule.make(groups, cfg)
    for name, parameter in parameters.items():
        states = cfg.state_format(parameter.shape, roles[name])
        shard = shard_of(parameter, (splits or {}).get(name))
        place = place_of(shard, stream_key(seed, f"rounding {name}"), states)
        optimizer.facts[parameter] = Facts(states, place, (copies or {}).get(name))
    start_state(optimizer, cfg)
    return optimizer


def start_state(optimizer: Updater, cfg: OptimConfig) -> None:
    """Give the present parameters of `optimizer` the state before the first step, and forget all others'."""
    rule = RULES[cfg.kind]
    optimizer.state.clear()
    present = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.facts = {p: optimizer.facts[p] for p in present if p in optimizer.facts}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            states = optimizer.facts.get(parameter, PLAIN).states
            optimizer.state[parameter] = rule.initial_state(parameter, group, states, cfg)


def optimizer_tensors(optimizer: Updater, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizer's state by canonical name: `<parameter>.<state>` -> tensor (no copy)."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
