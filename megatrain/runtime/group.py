"""Process group of the processes that a launcher has started."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from megatrain.config.errors import StalledError, StopRequested, UserError
from megatrain.runtime.alive import WINDOW_S, signs_of_work
from megatrain.runtime.device import pick_device
from megatrain.runtime.guard.handle import Guard
from megatrain.runtime.guard.seam import Seam
from megatrain.runtime.guarded import GuardedProcesses
from megatrain.runtime.joining import meet, told
from megatrain.runtime.meetings import Meetings
from megatrain.runtime.processes import MEETING, Processes

T = TypeVar("T")
JOINING_S = 600.0
"""How long processes wait for one another before they know `resilience.timeout_s`, by default."""
TIMED_OUT = ("Timed out waiting", "Application timeout", "timed out", "collective operation timeout")
"""Words by which gloo, NCCL and stores say that another process did not answer."""
NCCL_LATER_S = 30.0
"""How much later than `resilience.timeout_s` NCCL aborts a process, which could not say anything any more."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class JoinedProcesses(GuardedProcesses):
    """Several, over a gloo group of their own: nothing here meets the collectives of training."""

    meetings: Meetings = field(kw_only=True)

    def gather(self, value: T) -> list[T]:
        self.meetings.wait()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def report(self) -> None:
        self.meetings.report()

    def explain(self, error: BaseException) -> BaseException:
        if self.guard is None:
            return explained(error)
        failure = None if self.meetings.seam is None else self.meetings.seam.failure
        chain: list[BaseException | None] = [error]
        while (last := chain[-1]) is not None:
            chain.append(last.__cause__ or last.__context__)
        is_of_others = any(each is failure or isinstance(each, dist.DistError) for each in chain[:-1])
        return explained(self.guard.explain(error, is_of_others=is_of_others))

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        return signs_of_work(self.report, window_s=min(WINDOW_S, self.meetings.timeout_s / 4))

    def beside(self, name: str) -> Processes:
        timeout = timedelta(seconds=self.meetings.timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        return replace(self, group=group, meetings=self.meetings.beside(name))

    def limit_waits(self, timeout_s: float) -> None:
        self.meetings.timeout_s = timeout_s
        super().limit_waits(timeout_s)
        for group, (backend, _) in list(dist.distributed_c10d._world.pg_map.items()):
            if backend in ("gloo", "nccl"):
                later = NCCL_LATER_S if backend == "nccl" and self.guard is not None else 0.0
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + later), group)


@contextlib.contextmanager
def joined(timeout_s: float = JOINING_S) -> Iterator[Processes]:
    """Join the other processes that the environment speaks of (`is_started`), until the end of the block.

    Args:
        timeout_s: how long to wait for them. Other waits have `JOINING_S` until `limit_waits`: importing takes long on
            a busy machine.

    Raises:
        UserError: what the environment says is incomplete, or there is no GPU for this process.
        StalledError: another process did not answer in time.
    """
    if os.environ["WORLD_SIZE"] == "1":
        yield Processes()
        return
    rank, size, local_rank, local_size = _places()
    _die_with_parent()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    device = pick_device(local_rank)
    guard = Guard(
        rank=rank, size=size, local_rank=local_rank, timeout_s=JOINING_S, meeting=os.environ.get(MEETING)
    )
    with guard, Seam(guard.record, guard.tell) as seam:
        try:
            store, address = meet(rank, size, timeout_s=timeout_s)
            if rank == 0:
                store.set("guard", json.dumps(guard.listen_at(address)))
            guard.report_to(json.loads(told(store, "guard", timeout_s=timeout_s)))
            group = _join(rank, size, device, store)
            guard.record.touch()
        except dist.DistError as error:
            text = (
                f"The processes can't meet: that of rank 0 has ended, or can't be reached ({_first(error)})."
            )
            raise StalledError(text) from error
        meetings = Meetings(store, rank, size, timeout_s=JOINING_S, seam=seam)
        processes = JoinedProcesses(rank, size, local_rank, local_size, group, meetings=meetings, guard=guard)
        try:
            yield processes
            # Launchers end the others when one has ended, and the first may still be writing the run's record.
            processes.gather(None)
        except StopRequested as stop:
            meetings.leave(stop.reason)
            raise
        except Exception as error:
            meetings.leave()
            raise processes.explain(error) from error
        dist.destroy_process_group()  # not after an error: it would wait for collectives that never end


def _join(rank: int, size: int, device: torch.device, store: dist.Store) -> dist.ProcessGroup:
    """Make the default group, which is training's, and return the gloo group beside it.

    NCCL learns its device at once: it can then split communicators for subgroups, instead of connecting each anew.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=JOINING_S)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("default", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    return dist.new_group(backend="gloo", timeout=timeout)


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def explained(error: BaseException) -> BaseException:
    """Return a `StalledError` in place of a library's error that says that another process did not answer."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TIMED_OUT):
        return StalledError(
            "Another process did not answer within resilience.timeout_s: it hangs, or its machine or network does. "
            f"What was saved stays; start again to go on from it. ({_first(error)})"
        )
    return error


def _places() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but {', '.join(missing)} is missing or not a number. "
            "Start with torchrun, set all four, or unset WORLD_SIZE."
        )
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return rank, size, local_rank, local_size


def _die_with_parent() -> None:
    """End when the launcher is killed (on Linux); it could not end this process any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
