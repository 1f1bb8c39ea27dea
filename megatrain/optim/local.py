"""Parameters that are cut over ranks: a rank's own part, the whole matrix, and back from it to the part.

Plain tensors are whole already. Of a DTensor any cut is taken, even or not, over one axis of the mesh or several.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """What this rank holds (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """`tensor` in full, bit for bit; every rank that holds a part of it must call this.

    Each rank puts its part among zeros, and these are added up over the axes that cut. (torch 2.13's `full_tensor` is
    wrong for a dimension that two axes cut, the first into more parts.)
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.to_local().device)
    back(full, tensor).copy_(tensor.to_local())
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():  # also the cut of a cut, which is no Shard
            dist.all_reduce(full, group=tensor.device_mesh.get_group(axis))
    return full


def back(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that this rank holds of `like`, a view."""
    if not isinstance(like, DTensor):
        return full
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        full = full.narrow(
            dim, min(offset, full.shape[dim] - size), size
        )  # an empty part may lie past the end
    return full
