"""What the parts are made of: named steps that return rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.clock import Clock

Row = dict[str, Any]
"""Facts that JSON can hold."""


def named(about: Row) -> str:
    """Return what a step's rows are about in words: the values, and of flags that are set the keys."""
    words = ((key if value is True else value) for key, value in about.items() if key != "part")
    return " ".join(str(word) for word in words if word not in (False, None, ""))


class Step(NamedTuple):
    """A piece of work that may fail alone."""

    about: Row
    """What its rows are about; a step that fails gives one row of this and the error. With "part", its rows are that
    part's, whichever part it runs in."""
    run: Callable[[], list[Row]]

    @property
    def name(self) -> str:
        """The step in words."""
        return named(self.about)


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is measured."""

    device: torch.device
    small: bool
    """Shapes that a CPU takes in seconds, for tests of the benchmark itself."""

    @cached_property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.device, seconds=0.005 if self.small else 0.06)


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
