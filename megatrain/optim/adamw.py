"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

from typing import Any

from torch import Tensor, nn

from megatrain.optim.config import AdamWConfig, MuonConfig, StateFormat
from megatrain.optim.rule import OptimizerRule, Updater
from megatrain.optim.step import initial_states, update
from megatrain_kernels.optimizer.reference import Update


class AdamW(Updater):
    """AdamW. State: `step`, `exp_avg`, `exp_avg_sq`.

    Not torch.optim.AdamW: on DTensors it goes through their dispatch, which takes seconds the first time and more time
    than the update itself later. The numbers are the same.
    """

    writes_copies = True

    def update_group(self, group: dict[str, Any], clip: Tensor | None) -> None:
        update(self, group, how(group, self.cfg), clip)


def how(group: dict[str, Any], cfg: AdamWConfig | MuonConfig) -> Update:
    """Return the update of the parameters of `group`."""
    rates = group.get("lr", cfg.lr), group.get("weight_decay", 0.0)
    return Update("adamw", *rates, cfg.beta1, cfg.beta2, cfg.eps, stochastic=cfg.stochastic_rounding)


def initial_state(
    parameter: nn.Parameter, group: dict[str, Any], states: StateFormat, cfg: AdamWConfig | MuonConfig
) -> dict[str, Tensor]:
    """Return zero moments, sharded as the parameter is, and the step count."""
    return initial_states(parameter, how(group, cfg), states)


RULE = OptimizerRule(AdamW, initial_state)
