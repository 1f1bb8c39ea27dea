"""Tensor-parallel and expert-parallel placements: which part of a parameter a rank holds, from its role in the plan.

A dimension is split between the ranks of an axis in whole units (heads, experts, rows of a table), as evenly as they
can be: where the axis does not divide them, the first ranks hold one more. Nothing is padded, so that nothing has to be
hidden from checkpoints, norms or the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatrain.nn.contract import Plan, Role, Weight
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import shards_heads, share_of
from megatrain.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Split:
    """A rank's part of a dimension that an axis of the mesh splits, in elements: `start` to `start + length`."""

    dim: int
    start: int
    length: int
    unit: int
    """Elements that stay together: those of a head."""


def tensor_placement(weight: Weight, ndim: int, ranks: int) -> Placement:
    """Return how a parameter of `ndim` dimensions of `weight` is sharded over `ranks` tensor-parallel ranks.

    Products are `(..., out, in)`: a column-parallel one shards its outputs and their bias, a row-parallel one its
    inputs, and its bias is replicated (arXiv 1909.08053, section 3). Keys and values of grouped heads are replicated
    if their heads cannot be distributed evenly.
    """
    role = weight.role
    if role & Role.VOCABULARY:
        return Shard(0)
    if role & Role.COLUMN:
        return Shard(max(0, ndim - 2)) if shards_heads(weight, ranks) else Replicate()
    return Shard(ndim - 1) if role & Role.ROW and ndim > 1 else Replicate()


def shard_parameter(
    module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, *, unit: int = 1
) -> None:
    """Replace the parameter `name` of `module` by an uninitialized DTensor over the one-dimensional `mesh`.

    Each rank keeps its share of the units, or all of them if `placement` replicates. The DTensor has the shape of the
    full parameter, also where the shares differ (which torch's own functions on DTensors do not expect).
    """
    parameter = module.get_parameter(name)
    local: torch.Tensor = parameter.data
    if isinstance(placement, Shard):
        dim = placement.dim
        share = share_of(local.shape[dim] // unit, mesh.size(), mesh.get_local_rank())
        local = local.narrow(dim, share.start * unit, len(share) * unit).contiguous()
    shape, stride = parameter.shape, parameter.stride()
    sharded = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def uneven_splits(plan: Plan, mesh: Mesh | None, cfg: ParallelConfig) -> dict[str, Split]:
    """Return this rank's part of each parameter that the tp or ep axis splits unevenly, by canonical name."""
    found: dict[str, Split] = {}
    if mesh is None:
        return found
    for at, weight in plan.weights.items():
        for name, shape in weight.parameters(at):
            if weight.role & Role.EXPERT and cfg.ep > 1:
                axis, ranks, unit, placement = mesh.ep, cfg.ep, 1, cast(Placement, Shard(0))
            elif cfg.tp > 1:
                axis, ranks, unit = mesh.tp, cfg.tp, weight.unit
                placement = tensor_placement(weight, len(shape), ranks)
            else:
                continue
            if isinstance(placement, Shard) and shape[placement.dim] // unit % ranks:
                share = share_of(shape[placement.dim] // unit, ranks, axis.get_local_rank())
                found[name] = Split(placement.dim, share.start * unit, len(share) * unit, unit)
    return found


class _LocalView(torch.autograd.Function):
    """The shard of a DTensor, whose gradient is a DTensor of the same shape, strides and placements.

    Not `to_local`, which computes the gradient's strides as if all shards were as large as this rank's.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.place = parameter.device_mesh, parameter.placements
        ctx.size = parameter.shape, parameter.stride()
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> DTensor:
        shape, stride = ctx.size
        return DTensor.from_local(
            grads[0].contiguous(), *ctx.place, run_check=False, shape=shape, stride=stride
        )


def local_view(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Return the rank's shard of a DTensor; its gradient is the shard of a DTensor placed alike.

    Used at the seam `parameter_view` of layers. The gradient of a replicated parameter is partial, from the rank's own
    tokens or heads: `ParallelModel.sum_replicated_gradients` sums the partial gradients once per step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    local: torch.Tensor = _LocalView.apply(parameter)
    return local


def local_view_without_bias(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Do as `local_view`, but return zero for a bias; used for row-parallel products on all ranks but the first.

    The ranks' partial outputs are summed, so one rank alone may add the bias.
    """
    view = local_view(name, parameter)
    return view * 0 if name == "bias" else view


def view_of_heads(heads: Sequence[int], head_dim: int, name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Do as `local_view`, but return the rows of `heads` alone, in that order; a head may occur several times."""
    rows = local_view(name, parameter).unflatten(0, (-1, head_dim))
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        rows = rows.narrow(0, heads[0], len(heads))  # a view
    else:
        rows = torch.cat(
            [rows.narrow(0, head, 1) for head in heads]
        )  # an index would be sent to the device each time
    return rows.flatten(0, 1)
