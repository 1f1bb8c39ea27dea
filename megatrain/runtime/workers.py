"""Processes that compute as ranks of one process group, for checks of layouts on one machine."""

import contextlib
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

T = TypeVar("T")
TIMEOUT_S = 120
TORCH = ("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.pipelining")
"""Modules that every worker needs and that are slow to import."""


class WorkerError(RuntimeError):
    """A worker's function raised; the message holds its traceback."""


class WorkerPool:
    """Processes for functions that run on several ranks. Use as a context manager.

    Every run has processes of its own, since torch caches the meshes and groups of earlier ones. They are forked from
    a server that has imported torch and `preload` once: importing them in each process would take seconds, a fork takes
    0.04 s.
    """

    def __init__(self, *preload: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megatrain-workers-")
        self._runs = 0
        mp.set_forkserver_preload([*TORCH, *preload])  # heeded by the first process that this one starts

    def __enter__(self) -> "WorkerPool":
        # Ctrl-C reaches every process of a terminal. This one ends the others, so they need not hear it.
        resource_tracker.ensure_running()  # which unblocks it; the server starts this one, too
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()  # it imports in the background
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, function: Callable[..., T], world_size: int, *args: Any) -> list[T]:
        """Call `function(*args)` on each of `world_size` ranks joined by gloo; returns the results by rank.

        Raises:
            WorkerError: it raised on some rank, or a process ended. The others are ended: they may wait forever.
        """
        self._runs += 1
        meeting = str(Path(self._folder.name) / f"run-{self._runs}")
        team = [_start(rank, world_size, meeting, function, args) for rank in range(world_size)]
        results: dict[int, Any] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(team)}
        try:
            while waiting:
                for ready in wait(list(waiting)):
                    results[waiting.pop(ready)] = _received(ready)
        except WorkerError as error:
            raise WorkerError(f"one of {world_size} processes: {error}") from None
        finally:
            _end(team, at_once=bool(waiting))
        return [results[rank] for rank in range(world_size)]


def _end(team: list[tuple[Any, Connection]], *, at_once: bool) -> None:
    for process, pipe in team:
        pipe.close()
        process.join(0 if at_once else 10)
    for process, _ in team:
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


def _start(
    rank: int, world_size: int, meeting: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, Connection]:
    here, there = mp.Pipe(duplex=False)
    process = mp.get_context("forkserver").Process(
        target=_serve, args=(there, rank, world_size, meeting, function, args), daemon=True
    )
    process.start()
    there.close()
    return process, here


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    meeting: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Join the other ranks, run the function, and send its result."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        result: tuple[bool, Any] = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    with contextlib.suppress(
        BrokenPipeError
    ):  # another rank's error was reported, and nobody waits for this one
        pipe.send(result)
    # Only now: whoever waits for this rank in vain shall not be reported before the error that made it leave.
    if dist.is_initialized():
        dist.destroy_process_group()
