"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere, nothing on request."""

import contextlib
import os
import sys
import time
from collections import deque
from itertools import pairwise
from typing import Any, Literal, Protocol

Row = dict[str, Any]

REFRESH_S = 0.2  # a live display is drawn again no more often than this
LINE_S = 10.0  # plain lines are no closer than this, so that a scheduler's log stays readable
BARS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Told what happens; decides what to show."""

    def phase(self, name: str, fraction: float) -> None: ...
    def start(self, total_steps: int, step: int, title: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


def make_display(mode: Literal["auto", "live", "plain", "off"]) -> Display:
    """The display for `mode`; auto is live on a terminal that can move its cursor, if rich is installed."""
    if mode == "off":
        return NoDisplay()
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if mode == "live" or (mode == "auto" and terminal):
        with contextlib.suppress(ImportError):
            from megatrain.observe.live import LiveDisplay

            return LiveDisplay()
    return PlainDisplay()


class NoDisplay:
    """Shows nothing."""

    def phase(self, name: str, fraction: float) -> None: ...
    def start(self, total_steps: int, step: int, title: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """One line every ten seconds, for every validation, and for every notice."""

    def __init__(self) -> None:
        self._phase = ""
        self._last_line = float("-inf")
        self._clock = Clock()

    def phase(self, name: str, fraction: float) -> None:
        if name != self._phase:
            self._phase = name
            self._print(f"data: {name}")

    def start(self, total_steps: int, step: int, title: str) -> None:
        self._clock = Clock(total_steps, step)
        self._print(title)
        if step:
            self._print(f"resuming at step {step} of {total_steps}")

    def step(self, row: Row) -> None:
        self._clock.tick(row)
        now = time.monotonic()
        if now - self._last_line < LINE_S and "eval/loss" not in row and not self._clock.finished:
            return
        self._last_line = now
        facts = "  ".join(f"{name} {value}" for name, value in describe(row))
        self._print(f"step {row['step']}/{self._clock.total}  {facts}  eta {self._clock.eta()}")

    def notice(self, text: str) -> None:
        self._print(text)

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed output must not end a run
            print(text, flush=True)


class Clock:
    """How far a run is, and when it will be done at the speed of its last steps."""

    def __init__(self, total: int = 0, step: int = 0) -> None:
        self.total = total
        self.done = step
        self._recent: deque[float] = deque(maxlen=50)

    def tick(self, row: Row) -> None:
        """Take in one more step."""
        self.done = row["step"]
        self._recent.append(row["perf/step_time_s"])

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def eta(self) -> str:
        """Time left, as 1h02m, 3m20s or 14s."""
        if not self._recent:
            return "?"
        seconds = round((self.total - self.done) * sum(self._recent) / len(self._recent))
        if seconds >= 3600:
            return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
        return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


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
    cuts = [round(i * len(values) / width) for i in range(width + 1)] if len(values) > width else None
    if cuts is not None:
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)
