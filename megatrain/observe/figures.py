"""Parts of displays: the figures of a row, progress and ETA, the loss curve, and safe output."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BARS = "▁▂▃▄▅▆▇█"
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("train/loss", "loss", "{:.4f}".format),
    ("eval/loss", "val loss", "{:.4f}".format),
    ("eval/bits_per_byte", "bits/byte", "{:.4f}".format),
    ("eval/accuracy", "accuracy", "{:.1%}".format),
    ("train/reward", "reward", "{:.3f}".format),
    ("eval/reward", "val reward", "{:.3f}".format),
    ("train/grad_norm", "grad norm", "{:.3f}".format),
    ("train/lr", "lr", "{:.2e}".format),
    ("perf/tokens_per_sec", "tokens/s", "{:,.0f}".format),
    ("perf/mfu", "MFU", "{:.1%}".format),
    (
        "perf/step_time_s",
        "step time",
        lambda seconds: f"{seconds:.2f}s" if seconds >= 1 else f"{seconds * 1e3:.0f}ms",
    ),
    ("memory/peak_gib", "memory", "{:.2f} GiB".format),
)
"""Key of metrics.jsonl, its short name, and how its value is written."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a display is told when training begins."""

    title: str
    total_steps: int
    step: int = 0
    """Steps that are done already."""
    facts: tuple[str, ...] = ()
    """What was read, and what the run will do, a sentence each."""
    steps_per_epoch: float | None = None
    """None for data without an end."""
    record: Path | None = None
    """metrics.jsonl, with the rows of the steps that are done."""


class Clock:
    """Progress of a run, the time since it began, and its ETA from the mean time between steps since its first one."""

    def __init__(self, total: int = 0, step: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = step
        self._now = now
        self._began = now()
        self._first: tuple[int, float] | None = None
        self._step_s = 0.0

    def tick(self, row: Row) -> None:
        """Take in the row of a step that is now done.

        The time between steps counts, so validations and checkpoints do; what came before the first step does not.
        """
        self.done = row["step"]
        if "perf/step_time_s" not in row:  # a validation before the first step
            return
        if self._first is None:
            self._first, self._step_s = (self.done, self._now()), row["perf/step_time_s"]
        else:
            step, began = self._first
            self._step_s = (self._now() - began) / max(self.done - step, 1)

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def eta(self) -> str:
        """Return the time left, as 2d03h, 1h02m, 3m20s or 14s."""
        return "?" if self._first is None else short_duration(max(self.total - self.done, 0) * self._step_s)

    def elapsed(self) -> str:
        """Return the time since training began or went on."""
        return short_duration(self._now() - self._began)


def short_duration(seconds: float) -> str:
    """Return seconds as 2d03h, 1h02m, 3m20s or 14s."""
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


class Course:
    """A long series, kept as a bounded number of means of equally many values."""

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
        """Return the means so far, oldest first; the last one may be of fewer values."""
        return [*self._means, sum(self._open) / len(self._open)] if self._open else self._means


def row_figures(row: Row, steps_per_epoch: float | None = None) -> list[tuple[str, str]]:
    """Return the figures of a row that a person watches, as (name, formatted value)."""
    figures = [(name, form(row[key])) for key, name, form in FIGURES if key in row]
    if steps_per_epoch:
        figures.append(("epoch", f"{row['step'] / steps_per_epoch:.2f}"))
    return figures


def sparkline(values: list[float], width: int) -> str:
    """Draw `values` as `width` characters, each the mean of its share; the highest is a full block."""
    if not values:
        return ""
    if len(values) > width:
        cuts = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def one_line(text: str) -> str:
    """Return the text without line breaks."""
    return " ".join(text.split())


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let a run go on when whoever read its output has gone (`| head -1`, a lost connection).

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


def amount(number: float) -> str:
    """Return a count in words: 1,500, 12.3 million, 4.6 billion, 1.2 trillion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def byte_size(size: float) -> str:
    """Return a size in decimal units."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def visible(text: str) -> str:
    """Return the text with what can't be seen spelled out: control characters, and all of a blank text.

    A model that writes nothing but line breaks shows as `\\n\\n` rather than as an empty space.
    """
    if not text.strip():
        return repr(text)[1:-1] or "(empty)"
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def say(text: str) -> None:
    """Print a line, whatever characters the output has, and whether or not anybody still reads it."""
    if sys.stdout is None:  # closed from the start
        return
    with unbreakable_output():
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
