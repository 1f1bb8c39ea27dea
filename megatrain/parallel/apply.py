"""The one order in which techniques are applied around a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from megatrain.parallel.compile import compile_blocks
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.context import context_parallel, cut_sequence
from megatrain.parallel.expert import expert_parallel
from megatrain.parallel.float8 import Scaling, float8_linears
from megatrain.parallel.fsdp import shard_data_parallel
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.pipeline import TABLE, Pipeline, balanced, keep_stage, layer_costs, own_stages
from megatrain.parallel.recompute import recompute_blocks
from megatrain.parallel.sharding import Role
from megatrain.parallel.tensor import tensor_parallel


@dataclass(frozen=True)
class ParallelModel:
    """What one rank holds of a model. In a run of one process `mesh` is None, and it is the model itself."""

    cfg: ParallelConfig
    models: list[nn.Module]
    """The stages of this rank; one without a pipeline."""
    mesh: Mesh | None = None
    pipeline: Pipeline | None = None

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """By canonical name; of two copies of a table on one rank the first."""
        found: dict[str, nn.Parameter] = {}
        for model in self.models:
            for name, parameter in model.named_parameters():
                found.setdefault(name, parameter)
        return found

    def shard_batch(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """This rank's positions of `(rows, seq)` tensors; doc_ids stay whole, since keys come from all ranks."""
        if self.mesh is None or self.cfg.cp == 1:
            return dict(tensors)
        rank, size = self.mesh.coordinate("cp"), self.cfg.cp
        return {
            name: t if t is None or name == "doc_ids" else cut_sequence(t, rank, size)
            for name, t in tensors.items()
        }

    def owns_loss(self) -> bool:
        """Is this the one rank of its tp group whose loss counts? (All of them have the same.)"""
        return self.mesh is None or self.mesh.coordinate("tp") == 0

    def owns_balance_loss(self) -> bool:
        """Does the balance loss count on this rank? Not if another of its tp group has the same tokens at the experts;
        in expert parallelism each has its own."""
        return self.owns_loss() or self.cfg.ep > 1

    def total(self, local: Tensor) -> Tensor:
        """The sum of all ranks' `local`."""
        if self.mesh is not None:
            dist.all_reduce(local)
        return local

    def squared_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of the squared 2-norm of the whole model's `tensors` (float64).

        Each element of the model counts on one rank.
        """
        own = [local for name, t in tensors.items() if (local := self._counted(name, t)) is not None]
        if not own:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(torch._foreach_norm(own)).to(torch.float64).square().sum()

    def _counted(self, name: str, t: Tensor) -> Tensor | None:
        """The local part, if this rank is the first of those that hold it."""
        if not isinstance(t, DTensor):
            return t
        if name == TABLE and self._follows_table():
            return None
        coordinate = t.device_mesh.get_coordinate()
        assert coordinate is not None
        copies = (
            place for place, how in zip(coordinate, t.placements, strict=True) if isinstance(how, Replicate)
        )
        return None if any(copies) else t.to_local()

    def _follows_table(self) -> bool:
        """Is the embedding here a copy of the first stage's?"""
        tied = self.pipeline is not None and self.pipeline.is_tied
        return tied and self.mesh is not None and self.mesh.coordinate("pp") > 0


def parallelize(
    make_model: Callable[[], nn.Module],
    cfg: ParallelConfig,
    mesh: Mesh | None,
    plan: Mapping[str, Role],
    *,
    compute_dtype: torch.dtype,
    float8: Scaling | None = None,
) -> ParallelModel:
    """This rank's part of the model that `make_model` makes on the meta device.

    The order: pipeline stages, expert, tensor, context, fp8, recomputation, compilation, ZeRO. `float8` is the scaling
    of linear layers in fp8; None: they compute in `compute_dtype`.
    """
    if mesh is None:
        model = make_model()
        wrap_blocks(model, cfg, float8)
        return ParallelModel(cfg, [model])
    models = list(_stages(make_model, cfg, mesh))
    is_tied = make_model().head is None
    for model in models:
        if mesh.experts is not None:
            expert_parallel(model, mesh.experts["ep"])
        if mesh.tp is not None:
            tensor_parallel(model, mesh.data["tp"], plan)
        if mesh.cp is not None:
            context_parallel(model, mesh.cp.get_group(), cfg.cp_kind)
        wrap_blocks(model, cfg, float8)
        shard_data_parallel(
            model,
            mesh.data["replicate", "shard"],
            experts_mesh=None if mesh.experts is None else mesh.experts["replicate", "shard"],
            zero_stage=cfg.zero_stage,
            compute_dtype=compute_dtype,
            reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        )
    if cfg.pp == 1:
        return ParallelModel(cfg, models, mesh)
    hidden: int = models[0].cfg.hidden_size  # type: ignore[union-attr, assignment]
    return ParallelModel(
        cfg, models, mesh, Pipeline(cfg, mesh, models, hidden, compute_dtype, is_tied=is_tied)
    )


def _stages(make_model: Callable[[], nn.Module], cfg: ParallelConfig, mesh: Mesh) -> Iterator[nn.Module]:
    if cfg.pp == 1:
        yield make_model()
        return
    for stage in own_stages(mesh.coordinate("pp"), cfg):
        model = make_model()
        firsts = [0, *cfg.pp_split] if cfg.pp_split else balanced(layer_costs(model), cfg.stages)
        keep_stage(model, stage, firsts)
        yield model


def wrap_blocks(model: nn.Module, cfg: ParallelConfig, float8: Scaling | None = None) -> None:
    """Quantize, recompute and compile the blocks of `model`."""
    if float8 is not None:
        float8_linears(model, float8)
    recompute_blocks(model, cfg.activation_checkpointing)
    if cfg.compile:
        compile_blocks(model)
