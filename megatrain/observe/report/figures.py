"""What a run reached, in figures with their units: the tiles of one run, the rows of a comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatrain.observe.figures import amount
from megatrain.observe.report.charts import elapsed_seconds
from megatrain.observe.report.record import Record

ENDINGS = {
    "running": "training now",
    "interrupted": "interrupted: killed, or its machine failed; run the same command again to resume",
    "finished": "finished",
    "stopped": "stopped, with everything saved",
    "failed": "failed",
    "unknown": "how it ended is not recorded",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: its name, its value with the unit, and what qualifies it."""

    name: str
    value: str
    note: str = ""


def figures_of(record: Record) -> list[Figure]:
    """Return the figures that a run has, the most important first."""
    made = (make(record) for make in MAKERS)
    return [figure for figure in made if figure is not None]


def ending(record: Record) -> str:
    """Return in a sentence how the run stands or ended."""
    reason = str(record.status.get("reason") or "")
    if record.state == "stopped":
        return (
            f"{ENDINGS['stopped']}, at stop_at"
            if reason == "stop_at"
            else f"{ENDINGS['stopped']}, by {reason}"
        )
    if record.state == "failed":
        return f"failed: {reason}"
    return (
        "finished early: the validation loss stopped improving"
        if reason == "early stop"
        else ENDINGS[record.state]
    )


def compared(records: Sequence[Record]) -> list[tuple[str, list[Figure | None]]]:
    """Return for each figure that any run has its name, and the figure of each run."""
    found = [{figure.name: figure for figure in figures_of(record)} for record in records]
    names = dict.fromkeys(name for figures in found for name in figures)
    return [(name, [figures.get(name) for figures in found]) for name in names]


def duration(seconds: float) -> str:
    """Return seconds in words: 0.4 s, 14 s, 3 min 20 s, 1 h 02 min, 2 d 3 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{round(seconds)} s"


def _finite(record: Record, key: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = record.metrics.series(key)
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _training_loss(record: Record) -> Figure | None:
    _, values = _finite(record, "train/loss")
    if not len(values):
        return None
    recent = max(1, len(values) // 50)
    note = "the last step" if recent == 1 else f"mean of the last {recent:,} rows"
    return Figure("Training loss", f"{values[-recent:].mean():.4f}", note)


def _best(key: str, name: str) -> Callable[[Record], Figure | None]:
    def make(record: Record) -> Figure | None:
        steps, values = _finite(record, key)
        if not len(values):
            return None
        best = int(values.argmin())
        last = "" if best == len(values) - 1 else f"; {values[-1]:.4f} at the last, step {steps[-1]:,.0f}"
        return Figure(name, f"{values[best]:.4f}", f"best, at step {steps[best]:,.0f}{last}")

    return make


def _steps(record: Record) -> Figure:
    done, total = record.metrics.steps[-1], record.total_steps
    return Figure("Steps", f"{done:,.0f}", f"of {total:,}" if total else "")


def _tokens(record: Record) -> Figure | None:
    _, values = _finite(record, "train/tokens")
    return Figure("Tokens trained on", amount(values[-1])) if len(values) else None


def _time(record: Record) -> Figure | None:
    seconds = elapsed_seconds(record)[-1]
    return Figure("Time in steps", duration(seconds), "without validations and saves") if seconds else None


def _median(
    key: str, name: str, form: str, unit: str, scale: float = 1.0
) -> Callable[[Record], Figure | None]:
    def make(record: Record) -> Figure | None:
        _, values = _finite(record, key)
        return Figure(name, f"{np.median(values) * scale:{form}}{unit}", "median") if len(values) else None

    return make


def _memory(record: Record) -> Figure | None:
    _, values = _finite(record, "memory/peak_gib")
    return Figure("Peak memory", f"{values.max():.2f} GiB", "first device") if len(values) else None


MAKERS: tuple[Callable[[Record], Figure | None], ...] = (
    _best("eval/loss", "Validation loss"),
    _best("eval/bits_per_byte", "Bits per byte"),
    _training_loss,
    _steps,
    _tokens,
    _time,
    _median("perf/tokens_per_sec", "Tokens per second", ",.0f", ""),
    _median("perf/mfu", "MFU", ".1f", " %", 100.0),
    _memory,
)
