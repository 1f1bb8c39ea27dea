"""`engine=accelerate`: Hugging Face Accelerate's DDP and FSDP2 (`fully_shard`) around the model.

Accelerate prepares the model and runs the passes. The parameters stay ordinary ones (DTensors under FSDP2), which
MegaTrain's own optimizer updates.
"""

import contextlib
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from megatrain.config.errors import UserError
from megatrain.engines.config import is_fsdp
from megatrain.engines.engine import Engine, Tensors
from megatrain.nn.block import Block
from megatrain.nn.decoder import Decoder
from megatrain.parallel.config import ParallelConfig


class AccelerateEngine(Engine):
    """The model as `Accelerator.prepare` returns it."""

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        cfg: ParallelConfig,
        *,
        ranks: int,
        compute_dtype: torch.dtype,
    ) -> None:
        """Prepare `model` in place, whose parameters `optimizer` has afterwards.

        Args:
            ranks: number of processes.
            compute_dtype: dtype in which FSDP2 gathers parameters.

        Raises:
            UserError: Accelerate did something else than what `cfg` asks for.
        """
        self.ranks = ranks
        shards = ranks > 1 and is_fsdp(cfg)
        plugin = _fsdp2(cfg, compute_dtype) if shards else None
        self.accelerator = _accelerator(next(model.parameters()).device, plugin)
        # It shards the final norm alone; nothing works in place on what that returns.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view", UserWarning)
        prepared, _ = self.accelerator.prepare(model, optimizer)
        self.model: nn.Module = prepared
        _check(self.accelerator, prepared, ranks=ranks, shards=shards)

    def forward_backward(self, batch: Tensors, *, scale: float, z_loss: float, is_last: bool) -> Tensor:
        # Under FSDP2 every backward pass reduces, as ZeRO-2 and 3 do: no rank has the full gradient at any time.
        waits = not is_last and isinstance(self.model, DistributedDataParallel)
        with self.accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
            loss: Tensor = self.model(**batch, z_loss=z_loss) * scale
            self.accelerator.backward(loss)
        return loss.detach()

    def close(self) -> None:
        self.accelerator.free_memory()


def _fsdp2(cfg: ParallelConfig, compute_dtype: torch.dtype) -> FullyShardedDataParallelPlugin:
    """Return the plugin that shards each block, with the native engine's precisions."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        cast_forward_inputs=False,
    )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=cfg.zero_stage == 3,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
    )


def _accelerator(device: torch.device, plugin: FullyShardedDataParallelPlugin | None) -> Accelerator:
    """Make the accelerator of this process on `device`."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        # Without cpu=True it would start as many independent runs as there are processes.
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", fsdp_plugin=plugin)
    torch.set_num_threads(threads)
    if plugin is not None and device.type == "cpu":
        # Accelerate 1.15 takes up an FSDP plugin on GPUs and their like only, and gives DDP on a CPU without a word.
        # Its FSDP2 code itself runs on CPUs; it looks at these two attributes.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _check(accelerator: Accelerator, model: nn.Module, *, ranks: int, shards: bool) -> None:
    """Compare what was prepared with what was asked for.

    Raises:
        UserError: they differ.
    """
    problem = ""
    if accelerator.num_processes != ranks:
        problem = f"{accelerator.num_processes} synchronized processes instead of {ranks}"
    elif shards and not (
        isinstance(model, FSDPModule) and all(_is_sharded(p, ranks) for p in model.parameters())
    ):
        problem = f"{type(model).__name__} with parameters that are not sharded over {ranks} ranks, instead of FSDP2"
    elif not shards and ranks > 1 and not isinstance(model, DistributedDataParallel):
        problem = f"{type(model).__name__} instead of DistributedDataParallel"
    if problem:
        raise UserError(
            f"engine=accelerate: Accelerate prepared {problem} (its distributed type is "
            f"{accelerator.distributed_type.value}). Unset the variables "
            "ACCELERATE_* of the environment, or use engine=native."
        )


def _is_sharded(parameter: nn.Parameter, ranks: int) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size() == ranks
        and all(placement.is_shard() for placement in parameter.placements)
    )
