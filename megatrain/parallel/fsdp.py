"""Data parallelism: ZeRO stages 0 to 3 (DDP, FSDP) and hybrids (HSDP), all by PyTorch's FSDP2 (`fully_shard`).

All stages are one mechanism. Stage 3 (FSDP) frees parameters after each use; stages 0 to 2 keep them for a step.
Stages 2 and 3 reduce-scatter gradients after each micro-batch, stages 0 and 1 after the last one; replicas all-reduce
theirs after the last one in every stage. Stage 0 (DDP) shards nothing: its mesh has only replicas.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh


def fully_shard_blocks(
    model: Decoder, plan: Plan, mesh: Mesh, cfg: ParallelConfig, *, compute_dtype: torch.dtype
) -> None:
    """Shard each block of `model`, and the rest of it, in place over the data-parallel ranks.

    Parameters are gathered in `compute_dtype`; gradients are summed in it or float32, whichever is wider.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {"reshard_after_forward": cfg.zero_stage == 3, "mp_policy": policy}
    data = mesh.data["replicate", "shard"]
    for _, block in model.blocks():
        if mesh.experts is not None and block.moe is not None:
            # Experts are replicated over other ranks than the other parameters.
            experts = mesh.experts["replicate", "shard"]
            place = partial(_expert_placement, experts.size(1))
            fully_shard(block.moe.experts, mesh=experts, shard_placement_fn=place, **options)
        fully_shard(block, mesh=data, **options)
    fully_shard(model, mesh=data, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP averages gradients over its ranks by default. Here each rank's loss is already divided by the
            # tokens of the global batch, so the gradients of ranks must be summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _expert_placement(ranks: int, parameter: nn.Parameter) -> Shard:
    """Shard the expert dimension, or the next one if the experts do not divide evenly over `ranks` and it does."""
    assert isinstance(parameter, DTensor)
    experts, size, _ = parameter.to_local().shape
    return Shard(1 if experts % ranks and size % ranks == 0 else 0)


def before_micro_batch(model: nn.Module, *, is_last: bool, zero_stage: int) -> None:
    """Set what the next backward pass reduces and frees; `is_last` says that it is the last one of the step."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last or zero_stage >= 2)
    model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or zero_stage == 3)
    model.set_is_last_backward(is_last)


def finish_backward(model: FSDPModule) -> None:
    """Reduce and free as `before_micro_batch` has set, after a backward pass that FSDP's hooks did not see.

    As `PipelineStage.perform_reduce_grad` of torch 2.13 does it.
    """
    root = fully_shard.state(model)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group.post_backward()
    root._root_post_backward_final_callback()


def unshard(model: nn.Module) -> None:
    """Gather all parameters; those that are gathered stay as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def reshard(model: nn.Module) -> None:
    """Drop the gathered parameters, so that the next pass gathers their present values."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
