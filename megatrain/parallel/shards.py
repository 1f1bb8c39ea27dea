"""A rank's part of a tensor, the whole from all ranks' parts, and back to the part.

Plain tensors are whole already. Of a DTensor any cut is taken, even or not, over one axis of the mesh or several.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatrain.nn.init import Shard, whole


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_of(tensor: Tensor) -> Hashable:
    """How `tensor` is cut and over which mesh: the same on every rank that holds a part of it."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def shard_of(tensor: Tensor) -> Shard:
    """The local part with its place in the whole."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.to_local().detach(), tensor.shape, offsets)


@torch.no_grad()
def full_tensor(tensor: Tensor, *, first: int = 0) -> Tensor:
    """`tensor` in full, bit for bit, on every rank that holds a part of it; all of them must call this.

    Dimensions before `first` stay cut: of stacked matrices a rank gets those whole that it has a part of.

    Each rank puts its part among zeros, and these are added up over the axes that cut. Not DTensor.full_tensor: torch
    2.13's failed on a dimension of 64 that FSDP cut into 4 and tensor parallelism into 2.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local = tensor.to_local()
    full = local.new_zeros(*local.shape[:first], *tensor.shape[first:])
    part_like(full, tensor, first=first).copy_(local)
    for axis, placement in enumerate(tensor.placements):
        # Not `is_shard`, which is False for the cut of a cut.
        if not placement.is_replicate() and placement.dim >= first:  # type: ignore[attr-defined]
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


def part_like(full: Tensor, like: Tensor, *, first: int = 0) -> Tensor:
    """The part of `full` that this rank holds of `like`, a view; `first` as in `full_tensor`."""
    if not isinstance(like, DTensor):
        return full
    values, _, offsets = shard_of(like)
    for dim in range(first, like.ndim):
        size = values.shape[dim]
        full = full.narrow(dim, min(offsets[dim], full.shape[dim] - size), size)  # empty: maybe past the end
    return full
