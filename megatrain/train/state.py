"""Content of a checkpoint: weights, optimizer state, weight average, position, and early-stopping counters."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from megatrain.engines.engine import Engine, Partitioned
from megatrain.optim.build import optimizer_tensors
from megatrain.optim.ema import WeightAverage
from megatrain.optim.master import MasterWeights
from megatrain.optim.rule import Updater
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.fsdp import reshard
from megatrain.parallel.shards import tell_place
from megatrain.train.objective import Objective
from megatrain.train.private_step import PrivateGradients


@dataclass
class TrainState:
    """The part of a run that changes from step to step.

    The data loader has no state of its own: the samples of a step are a function of the config and `step`.
    """

    parallel: ParallelModel
    weights: MasterWeights
    optimizer: Updater
    average: WeightAverage | None
    engine: Engine | None = None
    """Library that runs the passes; None: the native engine, which is PyTorch and nothing else."""
    objective: Objective | None = None
    """What is minimized; None: the cross entropy of the targets."""
    privacy: PrivateGradients | None = None
    """What makes the steps private; None: nothing."""
    step: int = 0
    """Number of optimizer steps done."""
    tokens: int = 0
    """Number of tokens with a loss seen so far."""
    watch: dict[str, Any] = field(default_factory=dict)
    """Counters of the over-fitting notice and of early stopping."""
    owed: dict[str, Any] = field(default_factory=dict)
    """The row of the present step, if a signal called off the validation that belongs to it."""
    base: dict[str, Any] = field(default_factory=dict)
    """Of adapters: the checkpoint that the frozen weights come from."""
    round: dict[str, Any] = field(default_factory=dict)
    """Of a worker of a federation: the round that its weights come from."""
    batches_passed_over: int = 0
    """Batches that were not trained on when the run went back to an earlier checkpoint; later steps read later ones."""

    @property
    def model(self) -> nn.Module:
        """Full model in a run of one process, else the rank's (first) pipeline stage."""
        return self.parallel.models[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of a checkpoint by its key. One is loaded into them, and then taken up by `restore`.

        Frozen weights are not in it: `frozen` has those.
        """
        buffers = {
            f"model.{name}": buffer
            for model in self.parallel.models
            for name, buffer in model.named_buffers()
        }
        if isinstance(self.engine, Partitioned):
            return self.engine.tensors() | buffers
        found: dict[str, Tensor] = {}
        for name, parameter in self.weights.trained.items():
            own = {f"model.{name}": parameter.detach()}
            states = optimizer_tensors(self.optimizer, {name: parameter})
            own |= {f"optim.{key}": value for key, value in states.items()}
            if self.average is not None:
                own[f"ema.{name}"] = self.average.averages[name]
            split = self.parallel.splits.get(name)
            found |= {
                key: t if split is None or t.ndim == 0 else tell_place(t, split) for key, t in own.items()
            }
        found |= buffers
        if self.objective is not None:
            found |= {f"objective.{name}": t for name, t in self.objective.tensors().items()}
        return found

    def frozen(self) -> dict[str, Tensor]:
        """Return the weights that are not trained, by their keys in the checkpoint of the run that they come from."""
        found = {
            name: parameter.detach()
            for name, parameter in self.weights.parameters.items()
            if not parameter.requires_grad
        }
        splits = self.parallel.splits
        return {
            f"model.{name}": tell_place(t, splits[name]) if name in splits else t for name, t in found.items()
        }

    def metadata(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, as JSON."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "watch": self.watch,
            "batches_passed_over": self.batches_passed_over,
            **({"owed": self.owed} if self.owed else {}),
        }

    def restore(self, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up `metadata`, and what was read into `tensors`."""
        self.step, self.tokens, self.watch = metadata["step"], metadata["tokens"], metadata["watch"]
        self.batches_passed_over = metadata.get(
            "batches_passed_over", 0
        )  # none in checkpoints of earlier versions
        self.owed = metadata.get("owed", {})
        self.take_up(tensors)

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        """Compute with what was read into `tensors`, some or all of those that `tensors()` has returned."""
        if isinstance(self.engine, Partitioned):
            self.engine.load(tensors)
        self.sync_model_weights()

    def close(self) -> None:
        """Give up what the engine holds."""
        if self.engine is not None:
            self.engine.close()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the moving average of the weights, if one is kept, in the `with` block; do not train in it."""
        if self.average is None:
            yield
            return
        self._swap_average(self.average)
        try:
            yield
        finally:
            self._swap_average(self.average)

    def _swap_average(self, average: WeightAverage) -> None:
        average.swap(self.weights.parameters)
        self.sync_model_weights()
        for model in self.parallel.models:
            reshard(model)  # a forward pass without a backward pass keeps the weights that it gathered

    def sync_model_weights(self, *, are_written: bool = False) -> None:
        """Copy the master weights to the model's compute weights, unless these `are_written` already."""
        if not are_written:
            self.weights.sync_model_weights()
        if self.parallel.pipeline is not None:
            self.parallel.pipeline.sync_tied_embeddings()
