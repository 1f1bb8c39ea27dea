"""All that a checkpoint holds: weights, optimizer, average, position, and the counters of early stopping."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from megatrain.optim.build import optimizer_tensors
from megatrain.optim.ema import WeightAverage
from megatrain.optim.master import MasterWeights
from megatrain.parallel.apply import ParallelModel


@dataclass
class TrainState:
    """The part of a run that changes from step to step.

    The data loader has no state of its own: the samples of a step are a function of the config and `step`.
    """

    parallel: ParallelModel
    weights: MasterWeights
    optimizer: Optimizer
    average: WeightAverage | None
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens with a loss, seen so far."""
    watch: dict[str, Any] = field(default_factory=dict)
    """Counters of the over-fitting notice and of early stopping."""

    @property
    def model(self) -> nn.Module:
        """The whole model of a run of one process; else the rank's (first) stage."""
        return self.parallel.models[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its key (no copies: loading writes into them)."""
        found: dict[str, Tensor] = {
            f"model.{name}": p.detach() for name, p in self.weights.parameters.items()
        }
        for model in self.parallel.models:
            found |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        for key, value in optimizer_tensors(self.optimizer, self.weights.parameters).items():
            found[f"optim.{key}"] = value
        if self.average is not None:
            found |= {f"ema.{name}": value for name, value in self.average.averages.items()}
        return found

    def facts(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON."""
        return {"step": self.step, "tokens": self.tokens, "watch": self.watch}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take up `facts` after the tensors were loaded in place."""
        self.step, self.tokens, self.watch = facts["step"], facts["tokens"], facts["watch"]
        self.publish()

    def publish(self) -> None:
        """Let the model compute with the weights' present values."""
        self.weights.publish()
        if self.parallel.pipeline is not None:
            self.parallel.pipeline.sync_tied_embeddings()
