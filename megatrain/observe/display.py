"""Terminal output of a run: a live table on a terminal, plain lines elsewhere, or nothing."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Literal, Protocol

from megatrain.observe.figures import BARS, Beginning, Clock, Row, one_line, row_figures, say

LINE_S = 10.0  # plain lines are no closer than this, so that a scheduler's log stays readable


class Display(Protocol):
    """Receiver of a run's progress that decides what to show. Output errors never reach the caller."""

    def phase(self, name: str, fraction: float) -> None:
        """Take note that a part of the work before the first step, such as `tokenizing`, is done to `fraction`."""

    def start(self, beginning: Beginning) -> None:
        """Take note that training begins, or goes on."""

    def step(self, row: Row) -> None:
        """Take in a row of metrics.jsonl."""

    def notice(self, text: str) -> None:
        """Show something that a person should know."""

    def sample(self, step: int, text: str) -> None:
        """Take in a text by the model as it is after `step` steps."""

    def close(self) -> None:
        """Leave the terminal in order. Phases may follow."""


def make_display(mode: Literal["auto", "live", "plain", "off"]) -> Display:
    """Return the display for `mode`; auto is live on a terminal that can move its cursor.

    Without rich, or where the output's encoding lacks the characters, live is plain.
    """
    if mode == "off" or sys.stdout is None:  # None: the process was started with its output closed
        return NoDisplay()
    if _has_characters() and (mode == "live" or (mode == "auto" and _is_terminal())):
        with contextlib.suppress(ImportError):
            from megatrain.observe.live import LiveDisplay

            return LiveDisplay()
    return PlainDisplay()


def _has_characters() -> bool:
    try:
        f"{BARS}━╸".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except ValueError:  # closed
        return False


class NoDisplay:
    """A display that shows nothing."""

    def phase(self, name: str, fraction: float) -> None: ...
    def start(self, beginning: Beginning) -> None: ...
    def step(self, row: Row) -> None: ...
    def notice(self, text: str) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """A display that prints a line every ten seconds, for every validation, and for every notice."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._phase = ""
        self._last_line = float("-inf")
        self._clock = Clock(now=now)
        self._steps_per_epoch: float | None = None

    def phase(self, name: str, fraction: float) -> None:
        if name != self._phase:
            self._phase = name
            self._print(name)
        elif self._now() - self._last_line >= LINE_S:
            self._print(f"{name} {fraction:.0%}")

    def start(self, beginning: Beginning) -> None:
        self._clock = Clock(beginning.total_steps, beginning.step, self._now)
        self._steps_per_epoch = beginning.steps_per_epoch
        for line in (beginning.title, *beginning.facts):
            self._print(line)
        if 0 < beginning.step < beginning.total_steps:
            self._print(f"resuming at step {beginning.step} of {beginning.total_steps}")
        self._last_line = float("-inf")  # the first step is shown at once

    def step(self, row: Row) -> None:
        self._clock.tick(row)
        due = self._now() - self._last_line >= LINE_S
        if due or "eval/loss" in row or self._clock.finished:
            figures = "  ".join(f"{name} {value}" for name, value in row_figures(row, self._steps_per_epoch))
            times = f"elapsed {self._clock.elapsed()}  eta {self._clock.eta()}"
            self._print(f"step {row['step']}/{self._clock.total}  {figures}  {times}")

    def notice(self, text: str) -> None:
        self._print(one_line(text))

    def sample(self, step: int, text: str) -> None: ...  # the last one is printed at the end
    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        self._last_line = self._now()
        say(text)
