"""Processes that join as those of a run do, with their guards, and may be stopped or killed: one process each."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from megatrain.runtime.group import joined
from megatrain.runtime.processes import MEETING, Processes

Act = Callable[[Processes], Any]


@dataclass(frozen=True)
class Team:
    """The ranks of one run, which do `act` and leave what came of it in `folder`.

    The test needs the fixture `workers`, whose server has imported torch: they are forked from it.
    """

    folder: Path
    ranks: list[ForkServerProcess]

    def codes(self, seconds: float) -> list[int | None]:
        """Exit codes, once all have ended; those that have not after so long are killed."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0.0))
        found = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        return found

    def result(self, rank: int) -> tuple[str, Any, float]:
        """The kind of error of a rank (empty: none), its text or what `act` returned, and the seconds that took."""
        kind, value, seconds = json.loads((self.folder / f"rank-{rank}.json").read_text())
        return kind, value, seconds

    def log(self, rank: int) -> str:
        """What a rank printed."""
        return (self.folder / f"rank-{rank}.log").read_text()


def start(act: Act, size: int, folder: Path, *, limit_s: float) -> Team:
    """Start a team whose processes wait for one another for `limit_s`."""
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_member, args=(act, rank, size, folder, limit_s), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return Team(folder, ranks)


def _member(act: Act, rank: int, size: int, folder: Path, limit_s: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), MEETING: str(folder / "meeting")}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    with (folder / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    began = time.monotonic()
    found: tuple[str, Any] = ("", None)
    try:
        with joined() as processes:
            processes.limit_waits(limit_s)
            processes.describe(directory=str(folder))
            processes.gather(0)
            began = time.monotonic()
            found = ("", act(processes))
    except BaseException as error:
        found = (type(error).__name__, str(error))
    (folder / f"rank-{rank}.json").write_text(json.dumps([*found, time.monotonic() - began]))
    sys.stderr.flush()
    os._exit(1 if found[0] else 0)
