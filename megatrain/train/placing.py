"""A micro-batch on the device of a rank that has a part of it."""

import torch
from torch import Tensor
from torch.profiler import record_function

from megatrain.data.loader import Batch
from megatrain.parallel.apply import ParallelModel

ARGUMENTS = ("tokens", "targets", "positions", "doc_ids", "token_numbers", "factors", "teacher")
"""Tensors of a batch that are arguments of the model."""


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` to `device`; to a GPU from pinned memory, without which the host would wait for the copy."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def on_device(parallel: ParallelModel, batch: Batch) -> dict[str, Tensor | None]:
    """Return this rank's shard of `batch` on the device, by the names of the model's arguments."""
    with record_function("data"):
        tensors = parallel.shard_batch({name: getattr(batch, name) for name in ARGUMENTS})
        device = parallel.device
        return {name: None if t is None else copied_to(t, device) for name, t in tensors.items()}
