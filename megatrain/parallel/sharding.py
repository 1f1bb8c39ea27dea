"""Tensor-parallel placements: how a parameter is sharded over the tp axis, from its role in the model's plan."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatrain.nn.contract import Role


def tensor_placement(role: Role, ndim: int) -> Placement:
    """Return how a parameter of `ndim` dimensions with that role is sharded over the tp axis.

    Products are `(..., out, in)`: a column-parallel one shards its outputs and their bias, a row-parallel one its
    inputs, and its bias is replicated (arXiv 1909.08053, section 3).
    """
    if role & Role.VOCABULARY:
        return Shard(0)
    if role & Role.COLUMN:
        return Shard(max(0, ndim - 2))
    return Shard(ndim - 1) if role & Role.ROW and ndim > 1 else Replicate()


def shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace the parameter `name` of `module` by an uninitialized DTensor over the one-dimensional `mesh`.

    Each rank keeps an equal shard, or all of it if `placement` replicates.
    """
    parameter = module.get_parameter(name)
    local: torch.Tensor = parameter.data
    if isinstance(placement, Shard):
        local = local.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    shape, stride = parameter.shape, parameter.stride()
    sharded = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(sharded))


def local_view(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Return the rank's shard of a DTensor; its gradient is the shard of a DTensor placed alike.

    Used at the seam `parameter_view` of layers. The gradient of a replicated parameter is partial, from the rank's own
    tokens or heads: `ParallelModel.sum_replicated_gradients` sums the partial gradients once per step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


def local_view_without_bias(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Do as `local_view`, but return zero for a bias; used for row-parallel products on all ranks but the first.

    The ranks' partial outputs are summed, so one rank alone may add the bias.
    """
    view = local_view(name, parameter)
    return view * 0 if name == "bias" else view
