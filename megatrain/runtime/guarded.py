"""Processes with a guard beside each, which says where one stands still: also one that is alone."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatrain.config.errors import StopRequested
from megatrain.runtime.guard.handle import Guard
from megatrain.runtime.processes import Processes


@dataclass(frozen=True)
class GuardedProcesses(Processes):
    """This process among those of the run, and its guard, unless others look after it."""

    guard: Guard | None = field(default=None, kw_only=True)

    def report(self) -> None:
        if self.guard is not None:
            self.guard.record.touch()

    def doing(self, phase: str, step: int = -1) -> None:
        if self.guard is not None:
            self.guard.record.doing(phase, step)

    def explain(self, error: BaseException) -> BaseException:
        return error if self.guard is None else self.guard.explain(error, is_of_others=False)

    def notices(self) -> list[dict[str, Any]]:
        return [] if self.guard is None else self.guard.notices()

    def describe(self, **facts: Any) -> None:
        if self.guard is not None:
            self.guard.tell({"do": "run", **facts})

    def limit_waits(self, timeout_s: float) -> None:
        self.describe(limit=timeout_s)


@contextlib.contextmanager
def guarded(processes: Processes, *, timeout_s: float) -> Iterator[Processes]:
    """Give a process that is alone a guard until the end of the block; several have theirs since they met.

    Args:
        timeout_s: how long it may stand still: neither compute nor read nor write. Stopped, it is not judged: nobody
            waits for it.
    """
    if processes.size > 1:
        yield processes
        return
    guard = Guard(rank=0, size=1, local_rank=0, timeout_s=timeout_s, meeting=None)
    with guard:
        guard.tell({"do": "alone"})
        alone = GuardedProcesses(guard=guard)
        try:
            yield alone
        except StopRequested:
            raise
        except Exception as error:
            alone.explain(error)
            raise
