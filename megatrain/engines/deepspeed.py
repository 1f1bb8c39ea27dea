"""`engine=deepspeed`: DeepSpeed's ZeRO stages 0 to 3, and optimizer offload, around the model.

DeepSpeed runs the passes. At stage 0 it sums gradients and nothing else. From stage 1 on it has weights and optimizer
state in flat partitions, which it updates with the run's own optimizer.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, zeros
from torch.optim import Optimizer

from megatrain.engines.engine import Engine, Partitioned, Tensors
from megatrain.nn.contract import Plan, Role
from megatrain.nn.decoder import Decoder
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shards import full_tensor, shard_like

INFERENCE_ONLY = "deepspeed_shm_comm"
"""C++ extension that DeepSpeed would compile when it starts on a CPU, though only its inference calls it."""


class DeepSpeedEngine(Engine):
    """Stage 0: each rank has the full model, and DeepSpeed averages the gradients."""

    def __init__(self, model: Decoder, optimizer: Optimizer, options: dict[str, Any], *, ranks: int) -> None:
        """Wrap `model`.

        Args:
            options: DeepSpeed's config.
            ranks: number of processes.
        """
        self.ranks = ranks
        self.owns_group = not dist.is_initialized()
        if self.owns_group:  # a run of one process; DeepSpeed needs a group all the same
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Those that it calls have got other names in torch 2.13.
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
        deepspeed.ops.__compatible_ops__[INFERENCE_ONLY] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        buffers = {buffer: buffer.dtype for buffer in model.buffers()}
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]
        for buffer, dtype in buffers.items():  # bf16 has converted them as well as the weights
            buffer.data = buffer.data.to(dtype)

    def forward_backward(self, batch: Tensors, *, scale: float, z_loss: float, is_last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self.engine(**batch, z_loss=z_loss) * scale
        self.engine.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def close(self) -> None:
        self.engine.destroy()
        if self.owns_group:
            deepspeed.comm.destroy_process_group()


class ZeroEngine(DeepSpeedEngine, Partitioned):
    """Stages 1 to 3. Full tensors exist one at a time, when a checkpoint is saved or loaded."""

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        options: dict[str, Any],
        *,
        plan: Plan,
        mesh: Mesh | None,
        initial_state: Callable[[Tensor], dict[str, Tensor]],
    ) -> None:
        """Wrap `model` and `optimizer`, whose state starts anew.

        Args:
            initial_state: returns the state of a flat partition before the first step.
        """
        self.mesh = mesh
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        super().__init__(model, optimizer, options, ranks=1 if mesh is None else mesh.whole.size())
        self.zero = self.engine.optimizer
        self.is_stage_3 = self.engine.zero_optimization_stage() == 3
        optimizer.state.clear()
        self.states = []
        zero = self.zero
        parts = zero.fp32_partitioned_groups_flat if self.is_stage_3 else zero.single_partition_of_fp32_groups
        for flat in parts:
            optimizer.state[flat] = initial_state(flat)
            self.states.append(optimizer.state[flat])
        self.keys = [key for key, value in self.states[0].items() if value.ndim > 0]
        if self.is_stage_3:
            _declare_head(model, plan)
        else:
            self.zero._lazy_init_hp_params_optimizer_state()  # else done by the first step; loading needs it

    def update(self) -> Tensor:
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"model.{name}"] = self._shard(name, safe_get_full_fp32_param(parameter))
            for key in self.keys:
                full = safe_get_full_optimizer_state(parameter, key)
                found[f"optim.{name}.{key}"] = self._shard(name, full)
            if "step" in self.states[0]:
                found[f"optim.{name}.step"] = self.states[0]["step"].clone()
        return found

    def _shard(self, name: str, full: Tensor) -> Tensor:
        """Return the part of `full` that this rank saves, as a DTensor; all of it in a run of one process."""
        full = full.view(self.shapes[name])
        if self.mesh is None:
            return full.clone()
        mesh = self.mesh.data["replicate", "shard"]
        held = zeros(full.shape, dtype=full.dtype, device_mesh=mesh, placements=[Replicate(), Shard(0)])
        held.to_local().copy_(shard_like(full, held))
        return held

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            for key in ("", *self.keys):
                value = tensors.get(f"optim.{name}.{key}" if key else f"model.{name}")
                if value is not None:
                    self._set(parameter, full_tensor(value), key)
        steps = {value.item() for key, value in tensors.items() if key.endswith(".step")}
        assert len(steps) <= 1, "every parameter takes every step"
        for state in self.states:
            for step in steps:
                state["step"].fill_(step)
        if not self.is_stage_3:
            self.zero.update_lp_params()

    def _set(self, parameter: Any, full: Tensor, key: str) -> None:
        """Set the part that this rank has of an optimizer state, or of the weight itself (`key` empty)."""
        if not self.is_stage_3:
            if key:
                safe_set_full_optimizer_state(parameter, full, key)
            else:
                safe_set_full_fp32_param(parameter, full)
            return
        # Stage 3's own setters of full tensors fail where the last rank's part is padded (0.19.8).
        own = full.new_zeros(parameter.ds_tensor.numel())
        part = full.flatten()[dist.get_rank() * own.numel() :][: own.numel()]
        own[: part.numel()] = part
        if key:
            safe_set_local_optimizer_state(parameter, own, key)
            return
        safe_set_local_fp32_param(parameter, own)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(full)


def _declare_head(model: Decoder, plan: Plan) -> None:
    """Let stage 3 gather the output head when `model` runs, which hands its weight to the loss itself."""
    for name, parameter in model.named_parameters():
        if plan.roles[name] & (Role.HEAD | Role.TIED):
            deepspeed.zero.register_external_parameter(model, parameter)


def options(
    *,
    stage: int,
    offload: bool,
    clip_norm: float | None,
    is_bf16: bool,
    micro_batch_size: int,
    micro_batches: int,
) -> dict[str, Any]:
    """Return DeepSpeed's config for `stage` with the run's own optimizer and schedule.

    Args:
        offload: keep optimizer state and master weights in main memory.
        clip_norm: maximum gradient norm; None: no clipping.
        micro_batch_size: sequences in a micro-batch of one rank. micro_batches: number of them in a step.
    """
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip_norm or 0.0,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
