"""ZeRO data parallelism, stages 0 to 3, and hybrids of it, by PyTorch's FSDP2 (`fully_shard`).

All stages are one mechanism. Stage 3 frees parameters after each use. In stages 0 to 2 they stay through a step.
Stages 2 and 3 sum gradients and cut them after each micro-batch, stages 0 and 1 after the last one; replicas sum theirs
after the last one in every stage. Stage 0 cuts nothing: its mesh has only replicas.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard


def shard_data_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    experts_mesh: DeviceMesh | None = None,
    zero_stage: int,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Cut each block of `model.layers` and the rest of `model` in place over `mesh` `(replicate, shard)`.

    `experts_mesh` is that of the blocks' experts, where other ranks hold the same ones.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"reshard_after_forward": zero_stage == 3, "mp_policy": policy}
    layers: Any = model.layers
    for block in layers.values():
        if experts_mesh is not None and block.moe is not None:
            place = partial(_expert_cut, experts_mesh.size(1))
            fully_shard(block.moe.experts, mesh=experts_mesh, shard_placement_fn=place, **options)
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum over the global batch divided once: gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _expert_cut(ranks: int, parameter: nn.Parameter) -> Shard:
    """Between experts, or through each where there are not as many for each of the `ranks`."""
    assert isinstance(parameter, DTensor)
    experts, size, _ = parameter.to_local().shape
    return Shard(1 if experts % ranks and size % ranks == 0 else 0)


def before_micro_batch(model: nn.Module, *, is_last: bool, zero_stage: int) -> None:
    """Set what the next backward pass reduces and frees; `is_last`: of the step."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last or zero_stage >= 2)
    model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or zero_stage == 3)
    model.set_is_last_backward(is_last)
