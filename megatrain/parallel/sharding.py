"""Tensor-parallel placements: from a parameter's role in the model's plan to how it is sharded over the tp axis."""

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
    """Replace the parameter `name` of `module` by a DTensor over the one-dimensional `mesh`, without values.

    Each rank keeps an equal part, or all of it where `placement` replicates.
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

    At the seam `parameter_view` of layers. The gradient of a replicated parameter is a rank's own share only, of its
    tokens or heads: `ParallelModel.sum_replicated_gradients` adds the shares up, once a step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


def local_view_without_bias(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Do as `local_view`, but return zero for a bias: of a row-parallel product, on all ranks but the first.

    The ranks' partial outputs are summed, so one rank alone may add the bias.
    """
    view = local_view(name, parameter)
    return view * 0 if name == "bias" else view
