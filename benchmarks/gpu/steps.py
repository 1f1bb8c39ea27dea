"""What the parts are made of: named steps that return rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.clock import Clock

Row = dict[str, Any]
"""Facts that JSON can hold."""


class Step(NamedTuple):
    """A piece of work that may fail alone."""

    about: Row
    """What its rows are about; a step that fails gives one row of this and the error."""
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is measured."""

    device: torch.device
    small: bool
    """Shapes that a CPU takes in seconds, for tests of the benchmark itself."""

    @cached_property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.device, seconds=0.005 if self.small else 0.15)


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
