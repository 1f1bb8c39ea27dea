"""Ranks that part from the others in every way: the one is named, with the operation, and everything ends.

All cases run at the same time, since most of it is waiting.
"""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from megatrain.config.errors import StalledError
from megatrain.runtime.group import joined
from megatrain.runtime.processes import MEETING, Processes
from megatrain.runtime.workers import WorkerPool

LIMIT_S = 4.0
LATE_S = 10.0
"""How long after the limit the sentence may come."""
SLEEP_S = 60.0


def missing(processes: Processes) -> None:
    dist.all_reduce(torch.zeros(2))
    if processes.rank == 1:
        time.sleep(SLEEP_S)
    dist.all_reduce(torch.zeros(3))


def other_order(processes: Processes) -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    if processes.rank == 1:
        dist.broadcast(b, 0)
        dist.all_reduce(a)
    else:
        dist.all_reduce(a)
        dist.broadcast(b, 0)


def other_shape(processes: Processes) -> None:
    dist.all_reduce(torch.zeros(5000 if processes.rank == 1 else 3))
    dist.all_reduce(torch.zeros(3))


def other_group(processes: Processes) -> None:
    """Two groups of the same ranks, taken in another order: each waits for the other."""
    first, second = (dist.new_group([0, 1], timeout=timedelta(seconds=LIMIT_S)) for _ in range(2))
    for group in (first, second) if processes.rank == 0 else (second, first):
        dist.all_reduce(torch.zeros(2), group=group)


def stopped(processes: Processes) -> None:
    dist.all_reduce(torch.zeros(2))
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(2))


def holds_the_lock(processes: Processes) -> None:
    if processes.rank == 1:
        library, mutex = (
            ctypes.PyDLL(None),
            ctypes.create_string_buffer(64),
        )  # it keeps the lock during a call
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    dist.all_reduce(torch.zeros(2))


def killed(processes: Processes) -> None:
    processes.doing("batch", 7)
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(2))


def raises(processes: Processes) -> None:
    if processes.rank == 1:
        raise ValueError("no such thing")
    dist.all_reduce(torch.zeros(2))


def does_not_send(processes: Processes) -> None:
    if processes.rank == 1:
        time.sleep(SLEEP_S)
    dist.recv(torch.zeros(2), 1)


def does_not_agree(processes: Processes) -> None:
    processes.gather(0)
    if processes.rank == 1:
        threading.Event().wait(SLEEP_S)
    processes.gather(0)


def sleeps_in_backward(processes: Processes) -> None:
    x = torch.zeros(2, requires_grad=True)

    def reduce(grad: torch.Tensor) -> None:
        if processes.rank == 1:
            time.sleep(SLEEP_S)
        dist.all_reduce(grad.clone())

    x.register_hook(reduce)
    x.sum().backward()


@dataclass(frozen=True)
class Case:
    plant: Callable[[Processes], None]
    says: str
    """Regular expression of the sentence; LINE stands for a line of this file."""
    waits: bool = True
    """Whether it takes the limit to notice."""
    code: int = 1
    """Exit code of rank 1."""
    first_code: int = 1
    """Exit code of rank 0."""
    hears: bool = True
    """Whether rank 1 can raise the sentence itself."""


HOST = r"\(host [^)]+\)"
AT = r"distributed/test_desynchronised\.py:LINE"
CASES = {
    "missing": Case(
        missing,
        rf"Rank 1 {HOST} did not arrive at all_reduce of float32 \(3,\), number 2 of group [^ ]+ \(ranks 0-1\), where "
        rf"rank 0 has waited since .* UTC \([^)]*{AT}\): it is .*, at {AT} in missing\.",
    ),
    "other_order": Case(
        other_order, rf"called (broadcast|all_reduce) .*{AT}, where rank . called .*{AT}", False
    ),
    "other_shape": Case(
        other_shape,
        rf"Rank . {HOST} called all_reduce of float32 \(\d+,\), number 1 of .* called all_reduce of float32 \(\d+,\)",
        False,
        first_code=-6,  # by gloo
    ),
    "other_group": Case(
        other_group, rf"Rank . {HOST} did not arrive at all_reduce .*{AT}.*, and waits in all_reduce .*{AT}"
    ),
    "stopped": Case(
        stopped,
        rf"Rank 1 {HOST} did not arrive at all_reduce .*, number 2 of .*: it is stopped \(SIGSTOP\)",
        code=-9,
        hears=False,
    ),
    "holds_the_lock": Case(
        holds_the_lock,
        rf"Rank 1 {HOST} did not arrive at all_reduce .* {AT} in holds_the_lock",
        code=-9,
        hears=False,
    ),
    "killed": Case(
        killed, rf"Rank 1 {HOST} ended without a word .* 'batch' of step 7", False, code=-9, hears=False
    ),
    "raises": Case(raises, rf"Rank 1 {HOST} failed at .*: ValueError: no such thing", False, hears=False),
    "does_not_send": Case(does_not_send, rf"Rank 1 {HOST} did not arrive at receive .* 1>0 \(ranks 0-1\)"),
    "does_not_agree": Case(does_not_agree, rf"Rank 1 {HOST} did not arrive at meeting, number 3 of meetings"),
    "sleeps_in_backward": Case(sleeps_in_backward, rf"Rank 1 {HOST} did not arrive at all_reduce .*{AT}"),
}


def member(name: str, rank: int, folder: Path) -> None:
    """Be one rank of a case: leave what is said, and when."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ[MEETING] = str(folder / "meeting")
    with (folder / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    began = time.monotonic()
    error: BaseException | None = None
    try:
        with joined() as processes:
            processes.limit_waits(LIMIT_S)
            processes.describe(directory=str(folder))
            processes.gather(0)
            began = time.monotonic()
            CASES[name].plant(processes)
    except BaseException as raised:
        error = raised
    said = [type(error).__name__, str(error), time.monotonic() - began]
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))
    sys.stderr.flush()
    os._exit(1)


@dataclass(frozen=True)
class Ended:
    folder: Path
    codes: list[int | None]

    def said(self, rank: int) -> tuple[str, str, float]:
        kind, text, seconds = json.loads((self.folder / f"rank-{rank}.json").read_text())
        return kind, text, seconds


@pytest.fixture(scope="module")
def ended(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    context = multiprocessing.get_context("forkserver")
    teams: dict[str, tuple[Path, list[ForkServerProcess]]] = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp(name)
        team = [context.Process(target=member, args=(name, rank, folder), daemon=True) for rank in (0, 1)]
        for process in team:
            process.start()
        teams[name] = folder, team
    found = {}
    for name, (folder, team) in teams.items():
        for process in team:
            process.join(LIMIT_S + LATE_S + 30)
        found[name] = Ended(folder, [process.exitcode for process in team])
        for process in team:
            process.kill()
    return found


def sentence(case: Case) -> str:
    return case.says.replace("LINE", r"\d+")


@pytest.mark.parametrize("name", CASES)
def test_the_rank_and_the_operation_are_named(ended: dict[str, Ended], name: str) -> None:
    case, found = CASES[name], ended[name]
    assert found.codes == [case.first_code, case.code], (found.folder / "rank-0.log").read_text()
    for rank in [rank for rank in (0, 1) if found.codes[rank] == 1 and (case.hears or rank == 0)]:
        kind, text, seconds = found.said(rank)
        assert kind == StalledError.__name__, text
        assert re.search(sentence(case), text), text
        assert seconds < LATE_S + (LIMIT_S if case.waits else 0)


@pytest.mark.parametrize("name", CASES)
def test_a_report_tells_what_all_ranks_did(ended: dict[str, Ended], name: str) -> None:
    (report,) = (ended[name].folder / "logs").glob("hang-*.txt")
    text = report.read_text()
    assert re.search(sentence(CASES[name]), text.splitlines()[0])
    assert re.search(r"^Rank 1 on .*: phase '.*', step", text, re.MULTILINE)
    if CASES[name].hears:
        assert "test_desynchronised.py" in text
        assert "most recent call first" in text


def test_no_guard_is_left(ended: dict[str, Ended]) -> None:
    deadline = time.monotonic() + 15
    while left := [line for line in _guards() for each in ended.values() if str(each.folder) in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _guards() -> list[str]:
    """The command lines of all guards that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:  # it has just ended
            continue
        if "megatrain.runtime.guard.process" in line:
            found.append(line)
    return found
