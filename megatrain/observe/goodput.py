"""Where a run's wall time went, over all its attempts, and how often it should save.

Read from its record alone: events.jsonl has when attempts began and ended, metrics.jsonl what their steps took.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatrain.config.errors import UserError
from megatrain.observe.report.figures import duration

HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
"""Device-hours between unexpected interruptions: 419 of 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, section
3.3.4)."""
FEW = 3
"""Failures from which on a run's own rate is used."""
CLASSES = (
    "training",
    "first step",
    "data",
    "evaluation",
    "saving",
    "start-up",
    "loading",
    "done again",
    "down",
    "other",
)
Row = dict[str, Any]


@dataclass
class Ledger:
    """Wall time by what it was spent on, in seconds."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    attempts: int = 0
    failures: int = 0
    """Attempts that ended neither at their end nor by a signal."""
    devices: int = 1
    save_s: float | None = None
    """Median time that training stands still for a save."""
    step_s: float | None = None
    """Median time of a step."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were taken that lasted."""
        return self.seconds["training"] / self.total if self.total else 0.0

    @property
    def between_failures_s(self) -> float:
        """Expected time between failures: the run's own rate, or that of a published run on as many devices."""
        if self.failures >= FEW:
            return (self.total - self.seconds["down"]) / self.failures
        return HOURS_BETWEEN_FAILURES * 3600 / self.devices

    @property
    def save_every(self) -> int | None:
        """Steps between saves by which the fewest time is lost; None if nothing was measured yet."""
        if not self.save_s or not self.step_s:
            return None
        return best_interval(self.save_s, self.between_failures_s, self.step_s)


def best_interval(save_s: float, between_failures_s: float, step_s: float) -> int:
    """Return the steps between saves that lose the least: sqrt(2 · save · time between failures) seconds.

    The first-order optimum of Young (doi 10.1145/361147.361115), which holds while saves are short against the time
    between failures.
    """
    return max(1, round(math.sqrt(2 * save_s * between_failures_s) / step_s))


def ledger(directory: Path) -> Ledger:
    """Return where the time of the run in `directory` went, which may be training at this moment.

    Raises:
        UserError: the directory has no events.
    """
    events = list(_rows(directory / "events.jsonl"))
    begins = [each for each in events if each.get("event") in ("start", "resume") and "elapsed_s" in each]
    if not begins:
        raise UserError(f"{directory}: there is no events.jsonl with the start of an attempt")
    rows: dict[int, list[Row]] = defaultdict(list)
    for row in _rows(directory / "metrics.jsonl"):
        rows[row.get("attempt", 0)].append(row)
    found = Ledger(attempts=len(begins), devices=begins[-1].get("machine", {}).get("processes", 1))
    steps = [row["perf/step_time_s"] for row in _all(rows) if "perf/step_time_s" in row]
    stalls = [each["stall_s"] for each in events if each.get("event") == "save" and "stall_s" in each]
    found.step_s = statistics.median(steps) if steps else None
    found.save_s = statistics.median(stalls) if stalls else None
    before: float | None = None
    for number, begin in enumerate(begins):
        lost = begins[number + 1]["lost"]["seconds"] if number + 1 < len(begins) else 0.0
        own = [each for each in events if each.get("attempt") == begin.get("attempt")]
        began = _time(begin) - begin["elapsed_s"]
        if before is not None:
            found.seconds["down"] += max(0.0, began - before)
        before = _add_attempt(found, begin, rows[begin["attempt"]], own, lost)
    return found


def _add_attempt(found: Ledger, begin: Row, rows: list[Row], events: list[Row], lost: float) -> float:
    """Add an attempt's time to the ledger; return when it ended (seconds since the epoch)."""
    began = _time(begin) - begin["elapsed_s"]
    ends = [_time(each) for each in events if each.get("event") in ("stop", "failure")]
    last = max((row["perf/elapsed_s"] for row in rows if "perf/elapsed_s" in row), default=begin["elapsed_s"])
    end = ends[-1] if ends else began + last + lost
    if not ends or any(each.get("event") == "failure" for each in events):
        found.failures += 1
    spent: dict[str, float] = defaultdict(float)
    spent["loading"] = begin["load_s"]
    spent["start-up"] = begin["elapsed_s"] - begin["load_s"]
    spent["done again"] = lost
    step, is_first = begin.get("step", 0), True
    for row in rows:
        spent["evaluation"] += row.get("perf/eval_time_s", 0.0)
        if (seconds := row.get("perf/step_time_s")) is None:
            continue
        count = max(1, row["step"] - step)
        step = row["step"]
        usual = min(seconds, found.step_s or seconds) if is_first else seconds
        is_first = False
        data = min(row.get("perf/data_time_s", 0.0), usual)
        spent["first step"] += (seconds - usual) * count
        spent["data"] += data * count
        spent["training"] += (usual - data) * count
    spent["saving"] = sum(each.get("stall_s", 0.0) for each in events if each.get("event") == "save")
    known = sum(spent.values())
    spent["other"] = max(0.0, end - began - known)
    for name, value in spent.items():
        found.seconds[name] += value
    return max(end, began + known)


def time_spent(directory: Path, *, several: bool = False) -> list[str]:
    """Return where the time of a run went, as lines; nothing if its record does not say."""
    try:
        lines = as_text(ledger(directory))
    except UserError:
        return []
    return [f"{directory}:", *lines] if several else lines


def as_text(found: Ledger) -> list[str]:
    """Return the ledger as lines: classes with their share, what failed, how often to save."""
    lines = [f"Wall time {duration(found.total)}, of which {found.goodput:.1%} trained:"]
    for name in CLASSES:
        seconds = found.seconds[name]
        if seconds > 0:
            lines.append(f"  {name:12s} {duration(seconds):>12s} {seconds / found.total:7.1%}")
    lines.append(f"Attempts: {found.attempts}, of which {found.failures} failed or were killed.")
    if found.save_every is not None:
        whose = "the run's own" if found.failures >= FEW else f"published for {found.devices} device(s)"
        lines.append(
            f"A save stops training for {found.save_s:.2g} s. With one failure in {duration(found.between_failures_s)} "
            f"({whose}), checkpoint.every={found.save_every} loses the least time."
        )
    return lines


def _time(event: Row) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _all(rows: dict[int, list[Row]]) -> Iterator[Row]:
    for each in rows.values():
        yield from each


def _rows(path: Path) -> Iterator[Row]:
    with suppress(OSError), path.open(errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row
