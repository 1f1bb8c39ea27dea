"""Work on many items, shared among the copies of a model that several processes have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatrain.runtime.processes import Processes
from megatrain.train.inference import TrainedModel

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Copies:
    """The copies of a model, of which this process has a part of one, or all of it."""

    processes: Processes
    own: int = 0
    """The copy that this process belongs to."""
    count: int = 1

    def share(self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[T]]) -> list[T]:
        """Return `work(items)`, of which each copy does every `count`-th item; all processes call this together.

        Args:
            work: returns a result for each item, which does not depend on the other items.
        """
        if self.count == 1:
            return work(items)
        mine = items[self.own :: self.count]
        with self.processes.at_work():
            done = work(mine) if mine else []
        found: list[Any] = [None] * len(items)
        for copy, results in self.processes.gather((self.own, done)):
            found[copy :: self.count] = results
        return found


def copies_of(trained: TrainedModel, processes: Processes) -> Copies:
    """Return the copies of `trained`, in which `processes` hold it."""
    mesh = None if trained.in_training else trained.parallel.mesh
    return Copies(processes) if mesh is None else Copies(processes, mesh.data_rank, mesh.cfg.dp_replicate)
