"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2)."""

from typing import Any

from torch import Tensor, nn

from megatrain.optim.config import LionConfig, StateFormat
from megatrain.optim.rule import OptimizerRule, Updater
from megatrain.optim.step import initial_states, update
from megatrain_kernels.optimizer.reference import Update


class Lion(Updater):
    """Lion: weight -= lr · (sign(beta1 · m + (1 - beta1) · gradient) + weight_decay · weight), then
    m = beta2 · m + (1 - beta2) · gradient. State: `exp_avg`, which is m."""

    writes_copies = True

    def update_group(self, group: dict[str, Any], clip: Tensor | None) -> None:
        update(self, group, how(group, self.cfg), clip)


def how(group: dict[str, Any], cfg: LionConfig) -> Update:
    """Return the update of the parameters of `group`."""
    rates = group.get("lr", cfg.lr), group.get("weight_decay", 0.0)
    return Update("lion", *rates, cfg.beta1, cfg.beta2, stochastic=cfg.stochastic_rounding)


def initial_state(
    parameter: nn.Parameter, group: dict[str, Any], states: StateFormat, cfg: LionConfig
) -> dict[str, Tensor]:
    """Return a zero momentum, sharded as the parameter is."""
    return initial_states(parameter, how(group, cfg), states)


RULE = OptimizerRule(Lion, initial_state)
