"""Processes wait for one that works, however long, and give up on one that stands still or fails."""

import os
import time
from datetime import timedelta
from pathlib import Path

from resharding import joined_processes
from torch import distributed as dist

from megatrain.config.errors import StalledError
from megatrain.runtime.group import JoinedProcesses, explained
from megatrain.runtime.workers import WorkerPool

LIMIT_S = 1.0


def join() -> tuple[JoinedProcesses, dist.Store]:
    return joined_processes(LIMIT_S), dist.distributed_c10d._get_default_store()


def compute_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def one_computes_then_stands_still(pipe: Path) -> tuple[list[int], float, str]:
    """What the ranks gathered, the seconds that took, and what rank 0 says of rank 1, which then reads from `pipe`."""
    processes, _ = join()
    before = time.monotonic()
    processes.from_first(lambda: compute_for(3 * LIMIT_S))
    gathered = processes.gather(processes.rank)
    took, said = time.monotonic() - before, ""
    if processes.rank == 1:
        with processes.at_work():  # it is not
            pipe.read_text()
        return gathered, took, said
    try:
        processes.gather(0)
    except StalledError as error:
        said = str(error)
    pipe.write_text("noticed")
    return gathered, took, said


def test_who_computes_is_waited_for_and_who_stands_still_is_not(workers: WorkerPool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (gathered, took, said), _ = workers.run(one_computes_then_stands_still, 2, tmp_path / "pipe")
    assert gathered == [0, 1]
    assert took >= 3 * LIMIT_S
    assert said.startswith("Process 1 of 2 gave no sign of work for 1 s (resilience.timeout_s)")


def one_fails() -> str:
    """What the rank that waits is told."""
    processes, _ = join()
    processes.meetings.timeout_s = 60.0
    if processes.rank == 1:
        processes.meetings.leave()
        return ""
    try:
        processes.gather(0)
    except StalledError as error:
        return str(error)
    return "nothing"


def test_who_failed_is_not_waited_for(workers: WorkerPool) -> None:
    before = time.monotonic()
    assert workers.run(one_fails, 2)[0] == "Process 1 of 2 has failed; its own message says why."
    assert time.monotonic() - before < 30


def one_skips_a_collective() -> str:
    """What a rank says of another one that does not take part in the sum of gradients, say."""
    processes, store = join()
    processes.limit_waits(LIMIT_S)
    if processes.rank == 1:
        store.wait(["it was noticed"], timedelta(seconds=60))
        return ""
    try:
        dist.barrier()
    except RuntimeError as error:
        store.set("it was noticed", "")
        return type(explained(error)).__name__
    return "nothing"


def test_a_collective_is_given_up_as_well(workers: WorkerPool) -> None:
    assert workers.run(one_skips_a_collective, 2)[0] == "StalledError"
