"""Which part of a tensor a rank holds, and the whole from all ranks' parts."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatrain.nn.init import Shard, whole


def shard_of(tensor: Tensor) -> Shard:
    """The local part of a DTensor with its place in the whole; of a plain tensor all."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.to_local().detach(), tensor.shape, offsets)


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """`tensor` in full on every rank that holds a part of it; all of them must call this.

    Not DTensor.full_tensor: torch 2.13's is wrong for a dimension that both FSDP and tensor parallelism cut, when
    the first has more ranks than the second (it narrows to a wrong size, or fails).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    values, shape, offsets = shard_of(tensor)
    full = torch.zeros(tuple(shape), dtype=tensor.dtype, device=values.device)
    part = full
    for dim, (offset, size) in enumerate(zip(offsets, values.shape, strict=True)):
        part = part.narrow(dim, min(offset, shape[dim]) if size == 0 else offset, size)
    part.copy_(values)
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            dist.all_reduce(full, group=tensor.device_mesh.get_group(dim))
    return full
