"""Interface of an optimizer: its constructor from parameter groups, and its initial state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatrain.optim.config import OptimizerConfig, StateFormat
from megatrain_kernels.optimizer.reference import Place

Groups = list[dict[str, Any]]


class Facts(NamedTuple):
    """What an optimizer knows of one parameter beside its tensors."""

    states: StateFormat = "full"
    place: Place | None = None
    """Where this rank's shard lies in the full tensor; None: it is full."""
    copy: Tensor | None = None
    """The model's own weight, in its compute type, that is written with the master weight."""


class Updater(Optimizer):
    """An optimizer of this project: `step` clips as well."""

    cfg: Any
    facts: dict[nn.Parameter, Facts]
    """By parameter; one that an engine has put in place of another has the default ones."""
    writes_copies = False
    """Whether `step` writes the model's own weights."""

    def __init__(self, groups: Groups, cfg: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        self.cfg = cfg
        self.facts = {}

    def step(self, clip: Tensor | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, whose gradients may be changed.

        Args:
            clip: factor on all gradients (`clip_factor`); None: 1.
        """
        with torch.no_grad():
            for group in self.param_groups:
                self.update_group(group, clip)

    def update_group(self, group: dict[str, Any], clip: Tensor | None) -> None:
        """Update the parameters of one group."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class OptimizerRule:
    """One optimizer; each function takes its config last."""

    make: Callable[[Groups, Any], Updater]
    """Makes the optimizer of groups as `groups.parameter_groups` returns them."""
    initial_state: Callable[[nn.Parameter, dict[str, Any], StateFormat, Any], dict[str, Tensor]]
    """Returns the state of a parameter of a group before the first step, so that a checkpoint always has it."""
