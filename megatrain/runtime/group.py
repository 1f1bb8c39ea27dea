"""Process group of the processes that a launcher has started."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from megatrain.config.errors import UserError
from megatrain.runtime.processes import MEETING, Processes

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long processes wait for one that prepares data; one that ends is noticed at once."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class JoinedProcesses(Processes):
    """Several, over a gloo group of their own: nothing here meets the collectives of training."""

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes that the environment speaks of (`is_started`), until the end of the block.

    Raises:
        UserError: what the environment says is incomplete.
    """
    if os.environ["WORLD_SIZE"] == "1":
        yield Processes()
        return
    rank, size, local_rank, local_size = _places()
    _die_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    meeting = os.environ.get(MEETING)
    dist.init_process_group(
        init_method=f"file://{meeting}" if meeting else "env://", rank=rank, world_size=size
    )
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield JoinedProcesses(rank, size, local_rank, local_size, group)
    dist.destroy_process_group()  # not after an error: it would wait for collectives that never end


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
