"""Processes that stay alive and compute in process groups of any size, for checks of layouts on one machine.

Starting a process and importing torch takes seconds; joining a new process group takes a fraction of one.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

T = TypeVar("T")
TIMEOUT_S = 120
RUNS_OF_A_TEAM = 8
"""Each run leaves its process groups behind, whose gloo threads wake up a hundred times a second."""


class WorkerError(RuntimeError):
    """A worker's function raised; the message holds its traceback."""


class WorkerPool:
    """Teams of processes, one a world size, each started when it is first needed. Use as a context manager.

    A team keeps its process group: torch caches device meshes, and a mesh whose groups are gone would come back.
    """

    def __init__(self) -> None:
        self._teams: dict[int, list[tuple[Any, Connection]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="megatrain-workers-")
        self._started = 0
        self._runs: dict[int, int] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for size in list(self._teams):
            self._end(size)
        self._folder.cleanup()

    def run(self, function: Callable[..., T], world_size: int, *args: Any) -> list[T]:
        """`function(*args)` on each of `world_size` ranks joined by gloo; results by rank.

        Raises:
            WorkerError: it raised on some rank, or a process ended. That team is ended: others may wait forever.
        """
        if self._runs.get(world_size, 0) >= RUNS_OF_A_TEAM:
            self._end(world_size)
        self._runs[world_size] = self._runs.get(world_size, 0) + 1
        if world_size not in self._teams:
            self._started += 1
            meeting = str(Path(self._folder.name) / f"team-{self._started}")
            self._teams[world_size] = [_start(rank, world_size, meeting) for rank in range(world_size)]
        team = self._teams[world_size]
        results: dict[int, Any] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(team)}
        try:
            for _, pipe in team:
                pipe.send((function, args))
            while waiting:
                for ready in wait(list(waiting)):
                    results[waiting.pop(ready)] = _received(ready)
        except (WorkerError, OSError) as error:
            self._end(world_size, at_once=True)
            raise WorkerError(f"one of {world_size} processes: {error}") from None
        return [results[rank] for rank in range(world_size)]

    def _end(self, world_size: int, *, at_once: bool = False) -> None:
        team = self._teams.pop(world_size)
        self._runs[world_size] = 0
        for _, pipe in team:
            pipe.close()
        for process, _ in team:
            process.join(0 if at_once else 10)
            if process.is_alive():
                process.kill()
                process.join()


def _received(pipe: Any) -> Any:
    try:
        good, value = pipe.recv()
    except (EOFError, OSError):
        raise WorkerError("it ended before it had a result") from None
    if not good:
        raise WorkerError(value)
    return value


def _start(rank: int, world_size: int, meeting: str) -> tuple[Any, Connection]:
    here, there = mp.Pipe()
    context = mp.get_context("spawn")
    process = context.Process(target=_serve, args=(there, rank, world_size, meeting), daemon=True)
    process.start()
    there.close()
    return process, here


def _serve(pipe: Connection, rank: int, world_size: int, meeting: str) -> None:
    """A worker's life: one job after the other until the pipe closes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            result: tuple[bool, Any] = (True, function(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)
    dist.destroy_process_group()
