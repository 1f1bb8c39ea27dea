"""Interface of an optimizer: its constructor from parameter groups, and its initial state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OptimizerRule:
    """One optimizer; each function takes its config last."""

    make: Callable[[Groups, Any], Optimizer]
    """Makes the optimizer of groups as `groups.parameter_groups` returns them."""
    initial_state: Callable[[nn.Parameter, dict[str, Any], Any], dict[str, Tensor]]
    """Returns the state of a parameter of a group before the first step, so that a checkpoint always has it."""
