"""A time budget is used up when the next step, and the save after it, might end too late."""

import time

import pytest

from megatrain.resilience import budget
from megatrain.resilience.budget import MARGIN_S, SLACK, TimeBudget


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start of the command, to be set."""
    seconds = [0.0]
    monkeypatch.setattr(budget, "STARTED", 1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + seconds[0])
    return seconds


def test_the_reserve_follows_the_longest_step_and_save(now: list[float]) -> None:
    found = TimeBudget(100.0, first_save_s=10.0)
    found.note_step(4.0)
    found.note_step(2.0)
    last = 100.0 - SLACK * (4.0 + 10.0) - MARGIN_S
    now[0] = last - 0.1
    assert not found.is_used_up()
    now[0] = last
    assert found.is_used_up()
    found.note_save(30.0)
    now[0] = last - 30.0
    assert found.is_used_up()


def test_without_a_limit_there_is_no_end(now: list[float]) -> None:
    now[0] = 1e9
    assert not TimeBudget(None, first_save_s=1.0).is_used_up()
