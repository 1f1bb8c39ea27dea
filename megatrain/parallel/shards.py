"""Conversion between a rank's shard of a tensor and the full tensor.

Plain tensors are full already. DTensors may be sharded evenly or not, over one axis of the mesh or several.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatrain.nn.init import Shard, unsharded


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_of(tensor: Tensor) -> Hashable:
    """Return how `tensor` is sharded and over which mesh: the same on every rank that holds a shard of it."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def shard_of(tensor: Tensor) -> Shard:
    """Return the local shard with its place in the full tensor."""
    if not isinstance(tensor, DTensor):
        return unsharded(tensor)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.to_local().detach(), tensor.shape, offsets)


@torch.no_grad()
def full_tensor(tensor: Tensor, *, first: int = 0) -> Tensor:
    """Return `tensor` in full, bit for bit, on every rank that holds a shard of it; all of them must call this.

    Dimensions before `first` stay sharded: of stacked matrices, a rank gets in full those that it holds a shard of.

    Each rank puts its shard among zeros, and these are summed over the axes that shard. Not DTensor.full_tensor: torch
    2.13's failed on a dimension of 64 that FSDP sharded into 4 and tensor parallelism into 2.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local = tensor.to_local()
    full = local.new_zeros(*local.shape[:first], *tensor.shape[first:])
    shard_like(full, tensor, first=first).copy_(local)
    for axis, placement in enumerate(tensor.placements):
        # Not `is_shard`, which is False for a shard of a shard (`_StridedShard`).
        if not placement.is_replicate() and getattr(placement, "dim", first) >= first:
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


def shard_like(full: Tensor, like: Tensor, *, first: int = 0) -> Tensor:
    """Return the part of `full` that this rank holds of `like`, as a view; `first` as in `full_tensor`."""
    if not isinstance(like, DTensor):
        return full
    values, _, offsets = shard_of(like)
    for dim in range(first, like.ndim):
        size = values.shape[dim]
        full = full.narrow(dim, min(offsets[dim], full.shape[dim] - size), size)  # empty: maybe past the end
    return full
