"""Interface of an engine: a library that runs the passes of a step, and perhaps the optimizer, on data-parallel ranks.

Everything else is MegaTrain's: model, initial weights, data order, loss, optimizer, schedule, evaluation, checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor | None]


class Engine(ABC):
    """An engine around one model. It takes the mean of the ranks' gradients, so losses are multiplied by `ranks`."""

    ranks: int
    """Number of ranks over which gradients are averaged."""

    @abstractmethod
    def forward_backward(self, batch: Tensors, *, scale: float, z_loss: float, is_last: bool) -> Tensor:
        """Run both passes of one micro-batch and return its loss (nats, summed over valid tokens), times `scale`.

        Args:
            batch: the arguments of the model by name, on the device.
            scale: factor on the loss before the backward pass, `ranks` included.
            is_last: whether the step's last micro-batch is run: gradients are complete afterwards.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up what the library holds, before the process group ends."""


class Partitioned(Engine):
    """An engine that has weights and optimizer state in partitions of its own, clips, and updates them."""

    @abstractmethod
    def update(self) -> Tensor:
        """Clip the gradients, take the optimizer's step at the learning rates of its groups, and return the norm.

        The norm (float64 scalar) is that of the full gradient before clipping.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of weights and optimizer state by the keys of a checkpoint, each rank a shard of it."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up those of `tensors` that are there, sharded as `tensors()` returns them."""
