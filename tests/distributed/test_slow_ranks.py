"""A rank whose own work takes longer than the others' is named once, with its host; equal ranks never are."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import teams
import torch
from torch import distributed as dist

from megatrain.runtime.processes import Processes
from megatrain.runtime.workers import WorkerPool

WORK_S = 0.02
STEPS = 120


def train(processes: Processes, *, slow: int | None, at: str) -> list[dict[str, object]]:
    """Steps of `WORK_S` of work; the rank `slow` takes thrice as long in one phase. Returns what rank 0 is told."""
    told: list[dict[str, object]] = []
    for step in range(STEPS):
        for phase in ("batch", "training"):
            processes.doing(phase, step)
            time.sleep(WORK_S / 2 + (2 * WORK_S if (processes.rank, phase) == (slow, at) else 0))
        dist.all_reduce(torch.zeros(1))
        processes.doing("result", step)
        told += processes.notices()
    return told


@pytest.mark.parametrize("at", ["batch", pytest.param("training", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named_once(workers: WorkerPool, tmp_path: Path, at: str) -> None:
    team = teams.start(partial(train, slow=1, at=at), 3, tmp_path, limit_s=20)
    assert team.codes(120) == [0, 0, 0], team.log(0)
    (told,) = team.result(0)[1]
    assert told["rank"] == 1
    assert told["notice"].startswith("Rank 1 (host ")
    assert told["own_s"] > 2 * told["usual_s"]
    assert team.result(1)[1] == []


def test_equal_ranks_are_not(workers: WorkerPool, tmp_path: Path) -> None:
    team = teams.start(partial(train, slow=None, at=""), 3, tmp_path, limit_s=20)
    assert team.codes(120) == [0, 0, 0], team.log(0)
    assert team.result(0)[1] == []


@pytest.mark.slow
def test_a_rank_that_stops_again_and_again_is_named(workers: WorkerPool, tmp_path: Path) -> None:
    team = teams.start(partial(train, slow=None, at=""), 3, tmp_path, limit_s=20)
    stopped = team.ranks[1].pid
    assert stopped is not None
    burst: Callable[[int], None] = partial(os.kill, stopped)
    while team.ranks[1].is_alive():
        try:
            burst(signal.SIGSTOP)
            time.sleep(0.1)
            burst(signal.SIGCONT)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    assert team.codes(120) == [0, 0, 0], team.log(0)
    assert 1 in [told["rank"] for told in team.result(0)[1]]
