"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere, nothing on request."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal, Protocol

Row = dict[str, Any]

REFRESH_S = 0.2  # a live display is drawn again no more often than this
LINE_S = 10.0  # plain lines are no closer than this, so that a scheduler's log stays readable
BARS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Told what happens; decides what to show. Nothing that goes wrong with the output reaches the caller."""

    def phase(self, name: str, fraction: float) -> None:
        """A part of the work before the first step, such as `tokenizing`, is done to `fraction`."""

    def start(self, total_steps: int, step: int, title: str) -> None:
        """Training begins, with `step` steps done already."""

    def step(self, row: Row) -> None:
        """A row of metrics.jsonl."""

    def notice(self, text: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """Leave the terminal in order. Phases may follow."""


def make_display(mode: Literal["auto", "live", "plain", "off"]) -> Display:
    """The display for `mode`; auto is live on a terminal that can move its cursor.

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
    """Shows nothing."""

    def phase(self, name: str, fraction: float) -> None: ...
    def start(self, total_steps: int, step: int, title: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """One line every ten seconds, for every validation, and for every notice."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._phase = ""
        self._last_line = float("-inf")
        self._clock = Clock(now=now)

    def phase(self, name: str, fraction: float) -> None:
        if name != self._phase:
            self._phase = name
            self._print(name)
        elif self._now() - self._last_line >= LINE_S:
            self._print(f"{name} {fraction:.0%}")

    def start(self, total_steps: int, step: int, title: str) -> None:
        self._clock = Clock(total_steps, step, self._now)
        self._print(title)
        if step:
            self._print(f"resuming at step {step} of {total_steps}")
        self._last_line = float("-inf")  # the first step is shown at once

    def step(self, row: Row) -> None:
        self._clock.tick(row)
        due = self._now() - self._last_line >= LINE_S
        if due or "eval/loss" in row or self._clock.finished:
            facts = "  ".join(f"{name} {value}" for name, value in describe(row))
            self._print(f"step {row['step']}/{self._clock.total}  {facts}  eta {self._clock.eta()}")

    def notice(self, text: str) -> None:
        self._print(one_line(text))

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        self._last_line = self._now()
        with unbreakable_output():
            encoding = sys.stdout.encoding or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), flush=True)


class Clock:
    """How far a run is, and when it will be done if it goes on as since its first step."""

    def __init__(self, total: int = 0, step: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = step
        self._now = now
        self._first: tuple[int, float] | None = None
        self._step_s = 0.0

    def tick(self, row: Row) -> None:
        """Take in the row of a step that is now done.

        The time between steps counts, so validations and checkpoints do; what came before the first step does not.
        """
        self.done = row["step"]
        if self._first is None:
            self._first, self._step_s = (self.done, self._now()), row["perf/step_time_s"]
        else:
            step, began = self._first
            self._step_s = (self._now() - began) / max(self.done - step, 1)

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def eta(self) -> str:
        """Time left, as 2d03h, 1h02m, 3m20s or 14s."""
        if self._first is None:
            return "?"
        seconds = round(max(self.total - self.done, 0) * self._step_s)
        minutes, hours = seconds // 60, seconds // 3600
        if hours >= 24:
            return f"{hours // 24}d{hours % 24:02d}h"
        if hours:
            return f"{hours}h{minutes % 60:02d}m"
        return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


class Course:
    """The course of a long series in a bounded number of means of equally many values."""

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._means: list[float] = []
        self._width = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Append a value; neighbours are merged when there are too many."""
        self._open.append(value)
        if len(self._open) < self._width:
            return
        self._means.append(sum(self._open) / self._width)
        self._open = []
        if len(self._means) == self._most:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._width *= 2

    def values(self) -> list[float]:
        """The means so far, oldest first; the last one may be of fewer values."""
        return [*self._means, sum(self._open) / len(self._open)] if self._open else self._means


def describe(row: Row) -> list[tuple[str, str]]:
    """The quantities of a row that a person watches, formatted."""
    facts = [("loss", f"{row['train/loss']:.4f}")]
    if "eval/loss" in row:
        facts.append(("val loss", f"{row['eval/loss']:.4f}"))
    if "eval/bits_per_byte" in row:
        facts.append(("bits/byte", f"{row['eval/bits_per_byte']:.4f}"))
    facts += [
        ("grad norm", f"{row['train/grad_norm']:.3f}"),
        ("lr", f"{row['train/lr']:.2e}"),
        ("tokens/s", f"{row['perf/tokens_per_sec']:,.0f}"),
    ]
    if "perf/mfu" in row:
        facts.append(("MFU", f"{row['perf/mfu']:.1%}"))
    return facts


def sparkline(values: list[float], width: int) -> str:
    """The course of `values` in `width` characters, each the mean of its share; highest is a full block."""
    if not values:
        return ""
    if len(values) > width:
        cuts = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Whoever read the output may have gone (`| head -1`, a lost connection): the run goes on without it.

    What was not written stays in Python's buffer and would fail again, at the latest when the process ends, and
    change its exit code; so from then on the output leads nowhere.
    """
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    except ValueError:  # the output is closed
        pass
