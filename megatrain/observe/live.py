"""The live display: a progress bar, the run's figures, the loss so far, the last sample, and notices. Needs rich.

Whatever the terminal's width, no value is cut: figures go on in another row, and sentences are wrapped.
"""

import contextlib
import time

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatrain.observe.figures import (
    Beginning,
    Clock,
    Course,
    Row,
    one_line,
    row_figures,
    sparkline,
    unbreakable_output,
    visible,
)
from megatrain.observe.report.metrics import read_metrics

REFRESH_S = 0.2  # it is drawn again no more often than this
KEPT_NOTICES = 4
SAMPLE_LINES = 4
STICKY = ("eval/loss", "eval/bits_per_byte", "eval/accuracy")
DRAWING_SHARE = 0.01  # of the time, at most, goes into drawing
GAP = 2  # columns between figures


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise: whoever read the output has gone, and rich would end the process.

        Raises:
            BrokenPipeError: always; the display deals with it.
        """
        raise BrokenPipeError


class LiveDisplay:
    """A display drawn in place, at most a few times per second; its last state stays on the screen."""

    def __init__(self) -> None:
        self._console = _Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._beginning: Beginning | None = None
        self._phase = ("", 0.0)
        self._clock = Clock()
        self._row: Row = {}
        self._losses = Course()
        self._lowest, self._highest = float("inf"), float("-inf")
        self._first_step = 0
        self._notices: list[str] = []
        self._sample = ""
        self._next_drawing = float("-inf")
        self._started = False
        self._width = self._console.width

    def phase(self, name: str, fraction: float) -> None:
        is_new = name != self._phase[0]
        self._phase = (name, fraction)
        self._draw(force=is_new or fraction >= 1)

    def start(self, beginning: Beginning) -> None:
        self._clock = Clock(beginning.total_steps, beginning.step)
        self._beginning, self._phase = beginning, ("", 0.0)
        if 0 < beginning.step < beginning.total_steps:
            self._notices.append(f"resumed at step {beginning.step}")
        if beginning.record is not None and beginning.step:
            self._take_up(beginning)
        with unbreakable_output():
            self._print_head(beginning)
        self._draw(force=True)

    def step(self, row: Row) -> None:
        self._clock.tick(row)
        if "train/loss" in row:
            self._add_loss(row["step"], row["train/loss"])
        self._row = {key: self._row[key] for key in STICKY if key in self._row} | row
        self._draw(force="eval/loss" in row or self._clock.finished)

    def notice(self, text: str) -> None:
        self._notices = [*self._notices, one_line(text)][-KEPT_NOTICES:]
        self._draw(force=True)

    def sample(self, step: int, text: str) -> None:
        self._sample = f"the model writes at step {step}: {one_line(visible(text))}"
        self._draw(force=True)

    def close(self) -> None:
        if self._started:
            self._draw(force=True)
            with unbreakable_output():
                self._live.stop()
            self._started = False

    def _take_up(self, beginning: Beginning) -> None:
        """Begin the curve with what the run's earlier attempts recorded; without it, if it can't be read."""
        assert beginning.record is not None
        with contextlib.suppress(OSError):
            metrics = read_metrics(beginning.record)
            for step, loss in zip(*metrics.series("train/loss"), strict=True):
                if np.isfinite(loss):
                    self._add_loss(int(step), float(loss))
            for key in STICKY:
                _, values = metrics.series(key)
                if len(values) and np.isfinite(values[-1]):
                    self._row[key] = float(values[-1])
            self._row["step"] = beginning.step

    def _add_loss(self, step: int, loss: float) -> None:
        self._first_step = self._first_step or step
        self._lowest, self._highest = min(self._lowest, loss), max(self._highest, loss)
        self._losses.add(loss)

    def _draw(self, *, force: bool) -> None:
        began = time.monotonic()
        if not force and began < self._next_drawing:
            return
        with unbreakable_output():
            if not self._started:
                self._live.start()
                self._started = True
            elif self._console.width < self._width:
                self._begin_screen()
            self._width = self._console.width
            self._live.update(self._picture(), refresh=True)
        ended = time.monotonic()
        self._next_drawing = ended + max(REFRESH_S, (ended - began) / DRAWING_SHARE)

    def _print_head(self, beginning: Beginning) -> None:
        """Print what stands above the part that is drawn again and again."""
        self._console.print(Text(beginning.title, style="bold"))
        for fact in beginning.facts:
            self._console.print(Text(fact, style="dim"))

    def _begin_screen(self) -> None:
        """Begin again at the top of an empty screen: what was on it scrolls up.

        Most terminals wrap lines anew that have become too long for them, some cut them, and none says how many rows
        the last drawing takes now, so it can't be drawn over.
        """
        self._console.file.write("\n" * self._console.height)
        self._console.control(Control.home())
        if self._beginning is not None:
            self._print_head(self._beginning)

    def _picture(self) -> RenderableType:
        width = self._console.width
        parts: list[RenderableType] = []
        if self._phase[0]:
            parts.append(_bar(self._phase[0], self._phase[1], width))
        if self._beginning is not None:
            share = self._clock.done / max(self._clock.total, 1)
            parts.append(_bar(f"step {self._clock.done}/{self._clock.total}", share, width))
            parts.append(Text(f"elapsed {self._clock.elapsed()}, {self._clock.eta()} left", style="dim"))
        if self._row and self._beginning is not None:
            parts += _in_rows(row_figures(self._row, self._beginning.steps_per_epoch), width)
        if curve := self._losses.values():
            steps = f"steps {self._first_step} to {self._clock.done}"
            name = (
                f"training loss, {steps}, from {self._highest:.4f} (highest) to {self._lowest:.4f} (lowest)"
            )
            parts += [Text(name, style="dim"), Text(sparkline(curve, min(72, width)), style="cyan")]
        if self._sample:
            lines = Text(self._sample).wrap(self._console, width)
            if len(lines) > SAMPLE_LINES:
                lines[SAMPLE_LINES - 1].truncate(width - 1)
                lines[SAMPLE_LINES - 1].append("…")
            parts += [Text(line.plain, style="italic") for line in lines[:SAMPLE_LINES]]
        parts += [Text(f"- {notice}", style="yellow") for notice in self._notices]
        return Group(*parts)


def _in_rows(figures: list[tuple[str, str]], width: int) -> list[RenderableType]:
    """Lay the figures out in as many rows as the width takes, each value below its name."""
    rows: list[list[tuple[str, str]]] = [[]]
    used = 0
    for name, value in figures:
        cell = max(len(name), len(value)) + GAP
        if rows[-1] and used + cell - GAP > width:
            rows.append([])
            used = 0
        rows[-1].append((name, value))
        used += cell
    return [_table(row) for row in rows]


def _table(figures: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, GAP, 0, 0))
    for name, _ in figures:
        table.add_column(name, header_style="dim", no_wrap=True)
    table.add_row(*(value for _, value in figures))
    return table


def _bar(label: str, share: float, width: int) -> Table:
    """Lay out the label, a bar in what room there is, and the percentage."""
    percent = f"{share:.0%}"
    room = width - len(label) - len(percent) - 2 * GAP
    grid = Table.grid(padding=(0, GAP, 0, 0))
    bar = [ProgressBar(total=1.0, completed=share, width=min(32, room))] if room >= 4 else []
    grid.add_row(Text(label), *bar, percent)
    return grid
