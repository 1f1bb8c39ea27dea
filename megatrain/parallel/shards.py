"""Conversion between a rank's shard of a tensor and the full tensor.

Plain tensors are full already. DTensors may be sharded evenly or not, over one axis of the mesh or several. Where the
tp or ep axis splits a dimension unevenly, torch does not know what a rank holds, and the functions here need its
`Split` (`sharding.uneven_splits`).
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatrain.nn.init import Shard
from megatrain.parallel.sharding import Split


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_of(tensor: Tensor) -> Hashable:
    """Return how `tensor` is sharded and over which mesh: the same on every rank that holds a shard of it."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def shard_of(tensor: Tensor, split: Split | None = None) -> Shard:
    """Return the local shard with its place in the full tensor."""
    if not isinstance(tensor, DTensor):
        return Shard(tensor.data, tensor.shape, (0,) * tensor.ndim)
    local = tensor.to_local().detach()
    if split is None:
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return Shard(local, tensor.shape, offsets)
    places = [0] * tensor.ndim
    places[split.dim] = split.start
    # The last axis of the mesh is tp or ep, which splits first; FSDP's axis cuts what is left into equal chunks.
    for axis, placement in enumerate(tensor.placements[:-1]):
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]
            length = split.length if dim == split.dim else tensor.shape[dim]
            chunk = -(-length // tensor.device_mesh.size(axis))
            places[dim] += min(length, chunk * tensor.device_mesh.get_local_rank(axis))
    return Shard(local, tensor.shape, tuple(places))


@torch.no_grad()
def full_tensor(tensor: Tensor, split: Split | None = None, *, first: int = 0) -> Tensor:
    """Return `tensor` in full, bit for bit, on every rank that holds a shard of it; all of them must call this.

    Dimensions before `first` stay sharded: of stacked matrices, a rank gets in full those that it holds a shard of.

    Each rank puts its shard among zeros, and these are summed over the axes that shard. Not DTensor.full_tensor: torch
    2.13's failed on a dimension of 64 that FSDP sharded into 4 and tensor parallelism into 2.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local = tensor.to_local()
    full = local.new_zeros(*local.shape[:first], *tensor.shape[first:])
    shard_like(full, tensor, split, first=first).copy_(local)
    for axis, placement in enumerate(tensor.placements):
        # Not `is_shard`, which is False for a shard of a shard (`_StridedShard`).
        if not placement.is_replicate() and getattr(placement, "dim", first) >= first:
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


def shard_like(full: Tensor, like: Tensor, split: Split | None = None, *, first: int = 0) -> Tensor:
    """Return the part of `full` that this rank holds of `like`, as a view; `first` as in `full_tensor`."""
    if not isinstance(like, DTensor):
        return full
    values, _, offsets = shard_of(like, split)
    for dim in range(first, like.ndim):
        size = values.shape[dim]
        full = full.narrow(dim, min(offsets[dim], full.shape[dim] - size), size)  # empty: maybe past the end
    return full


def shard_like_rows(like: Tensor, length: Callable[[int], int]) -> Tensor:
    """Return zeros of the type of `like`, sharded as it is; of a row, as many as `length` makes of its own length."""
    local, whole = (
        torch.Size((*size[:-1], length(size[-1]))) for size in (local_tensor(like).shape, like.shape)
    )
    zeros = torch.zeros(local, dtype=like.dtype, device=like.device)
    if not isinstance(like, DTensor):
        return zeros
    stride = tuple(math.prod(whole[dim + 1 :]) for dim in range(len(whole)))
    return DTensor.from_local(
        zeros, like.device_mesh, like.placements, run_check=False, shape=whole, stride=stride
    )


def tell_place(tensor: Tensor, split: Split) -> Tensor:
    """Let torch.distributed.checkpoint read and write this rank's shard of `tensor` at its place, and return `tensor`.

    It asks an object for the three methods below before it asks a DTensor's placements, which do not know `split`.
    """
    local, shape, offsets = shard_of(tensor, split)
    chunk = ChunkStorageMetadata(torch.Size(offsets), local.shape)
    properties = TensorProperties.create_from_tensor(local)

    def write_items(name: str, _: Any) -> list[WriteItem]:
        index = MetadataIndex(name, chunk.offsets)
        return [
            WriteItem(
                index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, torch.Size(shape))
            )
        ]

    place: Any = tensor
    place.__create_write_items__ = write_items
    place.__create_chunk_list__ = lambda: [chunk]
    place.__get_tensor_shard__ = lambda index: local
    return tensor
