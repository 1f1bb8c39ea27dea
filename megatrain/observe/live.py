"""The live display: a progress bar, the run's figures, the course of the loss, and notices. Needs rich."""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatrain.observe.figures import Clock, Course, Row, one_line, row_figures, sparkline, unbreakable_output

REFRESH_S = 0.2  # it is drawn again no more often than this
KEPT_NOTICES = 4
STICKY = ("eval/loss", "eval/bits_per_byte")
DRAWING_SHARE = 0.01  # of the time, at most, goes into drawing


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
        self._title = ""
        self._phase = ("", 0.0)
        self._clock = Clock()
        self._row: Row = {}
        self._losses = Course()
        self._notices: list[str] = []
        self._sample = ""
        self._next_drawing = float("-inf")
        self._started = False

    def phase(self, name: str, fraction: float) -> None:
        is_new = name != self._phase[0]
        self._phase = (name, fraction)
        self._draw(force=is_new or fraction >= 1)

    def start(self, total_steps: int, step: int, title: str) -> None:
        self._clock = Clock(total_steps, step)
        self._title, self._phase = title, ("", 0.0)
        if step:
            self._notices.append(f"resumed at step {step}")
        self._draw(force=True)

    def step(self, row: Row) -> None:
        self._clock.tick(row)
        if "train/loss" in row:
            self._losses.add(row["train/loss"])
        self._row = {key: self._row[key] for key in STICKY if key in self._row} | row
        self._draw(force="eval/loss" in row or self._clock.finished)

    def notice(self, text: str) -> None:
        self._notices = [*self._notices, one_line(text)][-KEPT_NOTICES:]
        self._draw(force=True)

    def sample(self, text: str) -> None:
        self._sample = one_line(text)
        self._draw(force=True)

    def close(self) -> None:
        if self._started:
            self._draw(force=True)
            with unbreakable_output():
                self._live.stop()
            self._started = False

    def _draw(self, *, force: bool) -> None:
        began = time.monotonic()
        if not force and began < self._next_drawing:
            return
        with unbreakable_output():
            if not self._started:
                self._live.start()
                self._started = True
            self._live.update(self._picture(), refresh=True)
        ended = time.monotonic()
        self._next_drawing = ended + max(REFRESH_S, (ended - began) / DRAWING_SHARE)

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._phase[0]:
            parts.append(_bar(self._phase[0], self._phase[1], ""))
        if self._title:
            parts.append(Text(self._title, style="bold"))
            share = self._clock.done / max(self._clock.total, 1)
            label = f"step {self._clock.done}/{self._clock.total}"
            parts.append(_bar(label, share, f"eta {self._clock.eta()}"))
        if self._row:
            parts.append(self._figures())
            width = max(10, min(72, self._console.width - 8))
            parts.append(Text(sparkline(self._losses.values(), width), style="cyan"))
        if self._sample:
            parts.append(Text(f"sample: {self._sample}", style="dim", no_wrap=True, overflow="ellipsis"))
        parts += [Text(f"- {notice}", style="yellow") for notice in self._notices]
        return Group(*parts)

    def _figures(self) -> Table:
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        figures = row_figures(self._row)
        for name, _ in figures:
            table.add_column(name, header_style="dim", no_wrap=True)
        table.add_row(*(value for _, value in figures))
        return table


def _bar(label: str, share: float, right: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(Text(label), ProgressBar(total=1.0, completed=share, width=32), f"{share:.0%}", right)
    return grid
