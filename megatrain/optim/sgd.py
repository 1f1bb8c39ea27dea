"""Stochastic gradient descent with momentum, as torch.optim.SGD defines it."""

from typing import Any

from torch import Tensor, nn

from megatrain.optim.config import SGDConfig, StateFormat
from megatrain.optim.rule import OptimizerRule, Updater
from megatrain.optim.step import initial_states, update
from megatrain_kernels.optimizer.reference import Update


class SGD(Updater):
    """SGD. State: `momentum_buffer`, if there is momentum.

    torch's starts it from the first gradient; a zero buffer gives the same: momentum · 0 + gradient.
    """

    writes_copies = True

    def update_group(self, group: dict[str, Any], clip: Tensor | None) -> None:
        update(self, group, how(group, self.cfg), clip)


def how(group: dict[str, Any], cfg: SGDConfig) -> Update:
    """Return the update of the parameters of `group`."""
    rates = group.get("lr", cfg.lr), group.get("weight_decay", 0.0)
    return Update("sgd", *rates, cfg.momentum, nesterov=cfg.nesterov, stochastic=cfg.stochastic_rounding)


def initial_state(
    parameter: nn.Parameter, group: dict[str, Any], states: StateFormat, cfg: SGDConfig
) -> dict[str, Tensor]:
    """Return a zero momentum buffer, if there is momentum."""
    return initial_states(parameter, how(group, cfg), states)


RULE = OptimizerRule(SGD, initial_state)
