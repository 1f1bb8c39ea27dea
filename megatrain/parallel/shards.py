"""A rank's part of a tensor, the whole from all ranks' parts, and back to the part.

Plain tensors are whole already. Of a DTensor any cut is taken, even or not, over one axis of the mesh or several.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatrain.nn.init import Shard, whole


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor) -> Shard:
    """The local part with its place in the whole."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.to_local().detach(), tensor.shape, offsets)


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """`tensor` in full, bit for bit, on every rank that holds a part of it; all of them must call this.

    Each rank puts its part among zeros, and these are added up over the axes that cut. Not DTensor.full_tensor: torch
    2.13's failed on a dimension of 64 that FSDP cut into 4 and tensor parallelism into 2.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.to_local().device)
    part_like(full, tensor).copy_(tensor.to_local())
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():  # `is_shard` is False for the cut of a cut
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that this rank holds of `like`, a view."""
    if not isinstance(like, DTensor):
        return full
    values, _, offsets = shard_of(like)
    for dim, (size, offset) in enumerate(zip(values.shape, offsets, strict=True)):
        full = full.narrow(
            dim, min(offset, full.shape[dim] - size), size
        )  # an empty part may lie past the end
    return full
