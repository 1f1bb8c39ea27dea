"""The ledger of a run's time, from a record written here: every second once, and the advice of the formula."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatrain.config.errors import UserError
from megatrain.observe.goodput import HOURS_BETWEEN_FAILURES, as_text, best_interval, ledger

Row = dict[str, Any]


def event(seconds: float, name: str, attempt: int, **facts: Any) -> Row:
    time = datetime.fromtimestamp(1_800_000_000 + seconds, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "event": name, "attempt": attempt, **facts}


def step(number: int, attempt: int, elapsed: float, seconds: float, **more: float) -> Row:
    return {
        "step": number,
        "attempt": attempt,
        "perf/elapsed_s": elapsed,
        "perf/step_time_s": seconds,
        "perf/data_time_s": 0.25,
        **more,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An attempt that was killed 3 steps after its last save, and one that ended; 100 s lie between them."""
    begins = {"machine": {"processes": 2}, "load_s": 1.0, "elapsed_s": 5.0}
    events = [
        event(5, "start", 1, step=0, lost={"steps": 0, "seconds": 0.0}, **begins),
        event(16, "save", 1, step=4, stall_s=2.0),
        event(127, "resume", 2, step=4, lost={"steps": 3, "seconds": 6.0}, **begins),
        event(142, "save", 2, step=8, stall_s=3.0),
        event(143, "stop", 2, step=8),
    ]
    rows = [step(1, 1, 9, 4.0), *(step(n, 1, 9 + 1.0 * (n - 1), 1.0) for n in (2, 3, 4))]
    rows += [step(n, 2, 5 + 1.0 * (n - 4), 1.0) for n in (5, 6, 7, 8)]
    rows[-1]["perf/eval_time_s"] = 4.0
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in rows) + '{"step": 9, "tor'
    )
    return tmp_path


def test_every_second_is_booked_once(run: Path) -> None:
    found = ledger(run)
    assert found.seconds == {
        "training": 8 * 0.75,
        "first step": 3.0,
        "data": 8 * 0.25,
        "evaluation": 4.0,
        "saving": 5.0,
        "start-up": 8.0,
        "loading": 2.0,
        "done again": 6.0,
        "down": pytest.approx(
            122 - 20
        ),  # the first was last seen 12 + 6 s after it began, plus what is not measured
        "other": pytest.approx(found.seconds["other"]),
    }
    assert found.total == pytest.approx(143)
    assert (found.attempts, found.failures, found.devices) == (2, 1, 2)
    assert found.goodput == pytest.approx(6 / 143)


def test_the_advice_is_young_s_formula(run: Path) -> None:
    found = ledger(run)
    assert (found.save_s, found.step_s) == (2.5, 1.0)
    between = HOURS_BETWEEN_FAILURES * 3600 / 2
    assert found.between_failures_s == between
    assert found.save_every == round(math.sqrt(2 * 2.5 * between))
    assert best_interval(10.0, 3600.0, 2.0) == 134
    assert best_interval(1e-9, 1.0, 100.0) == 1
    assert any(f"checkpoint.every={found.save_every}" in line for line in as_text(found))


def test_the_least_time_is_lost_there() -> None:
    """Against the loss itself: saves, and half an interval at each failure."""
    save, between = 20.0, 4 * 3600.0

    def lost(every: float) -> float:
        return save / every + every / 2 / between

    best = best_interval(save, between, 1.0)
    assert lost(best) == pytest.approx(min(lost(every) for every in range(10, 5000)), rel=1e-6)


def test_without_a_record_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start of an attempt"):
        ledger(tmp_path)
