"""Copies of a rank's shards in host memory, which are written while the originals change.

A checkpoint of the copies is that of the originals, byte for byte: the originals tell what torch.distributed.checkpoint
is to write of each tensor, and at which place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor

from megatrain.checkpoint.reader import TensorSpec, spec_of


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Tensors of one step: this rank's shards in host memory, with the specs of the global tensors."""

    tensors: dict[str, Tensor]
    specs: dict[str, TensorSpec]


class Stager:
    """Copies tensors into host memory that it keeps for the next time: pinned memory takes long to get.

    The copies of one call are overwritten by the next one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def stage(self, tensors: dict[str, Tensor]) -> HostCopy:
        """Copy this rank's shards of `tensors`; they may change as soon as this returns."""
        copies: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
                continue  # no shard of it is here
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            copies[name] = self._copied(name, local)
            _tell_place(copies[name], _create_write_items(name, tensor))
            if local.device.type == "cuda":
                devices.add(local.device)
        for device in devices:
            torch.cuda.synchronize(device)
        return HostCopy(copies, {name: spec_of(tensor) for name, tensor in tensors.items()})

    def _copied(self, name: str, local: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty_like(local, device="cpu", pin_memory=local.device.type == "cuda")
            self._buffers[name] = buffer
        buffer.copy_(local, non_blocking=True)
        return buffer.detach()  # an object of its own, which `_tell_place` marks


def _tell_place(copy: Tensor, items: list[WriteItem]) -> None:
    """Let torch.distributed.checkpoint write `items` from `copy`; it asks an object for these two methods first."""
    place: Any = copy
    place.__create_write_items__ = lambda name, _: items
    place.__get_tensor_shard__ = lambda index: copy
