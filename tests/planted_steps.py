"""Faults of steps, planted in a process by importing this module, as environment variables say.

PLANT_NAN, PLANT_SPIKE: numbers of the batches, with commas, whose gradient is not finite or whose loss is large, on the
rank PLANT_RANK. PLANT_FLIP: a bit of the second replica's weights differs.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatrain.train import failures, step
from megatrain.train.config import Config
from megatrain.train.state import TrainState

real, compare = step.accumulate_gradients, failures.compare_replicas


def planted(state: TrainState, batch: Any, cfg: Config, **options: Any) -> Any:
    loss = real(state, batch, cfg, **options)
    if os.environ.get("RANK", "0") == os.environ.get("PLANT_RANK", "0"):
        if str(batch.step) in os.environ.get("PLANT_NAN", "").split(","):
            gradient: Any = next(iter(state.weights.parameters.values())).grad
            getattr(gradient, "_local_tensor", gradient).view(-1)[0] = float("nan")
        if str(batch.step) in os.environ.get("PLANT_SPIKE", "").split(","):
            loss = loss * 1000
    return loss


def flipped(tensors: Mapping[str, Tensor], splits: Any, gather: Callable[..., Any]) -> Any:
    if os.environ.get("RANK") == "1":
        tensors["model.embed.weight"].view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    return compare(tensors, splits, gather)


step.accumulate_gradients = planted
if os.environ.get("PLANT_FLIP"):
    failures.compare_replicas = flipped
