"""Application of all parallelism techniques to a model, in the one order that works."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.parallel.activation_checkpointing import checkpoint_activations
from megatrain.parallel.collectives import gather
from megatrain.parallel.compile import compile_blocks
from megatrain.parallel.config import SPLIT_BACKWARD, ParallelConfig
from megatrain.parallel.context import context_parallel, in_order, shard_sequence
from megatrain.parallel.expert import expert_parallel
from megatrain.parallel.fake_quantization import fake_quantized_linears
from megatrain.parallel.float8 import Float8, KeptCodes, float8_linears
from megatrain.parallel.fsdp import fully_shard_blocks
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.pipeline import Pipeline, keep_products_apart, own_stages, stage_layers
from megatrain.parallel.sharding import Split, uneven_splits
from megatrain.parallel.shards import local_tensor
from megatrain.parallel.tensor import tensor_parallel

WHOLE = ("doc_ids", "teacher")
"""Tensors of a batch that context parallelism does not shard."""


@dataclass(frozen=True)
class ParallelModel:
    """The part of a model that one rank holds: in a run of one process, where `mesh` is None, the full model."""

    cfg: ParallelConfig
    plan: Plan
    models: list[Decoder]
    """Pipeline stages of this rank; a single one without a pipeline."""
    mesh: Mesh | None = None
    pipeline: Pipeline | None = None
    float8_codes: KeptCodes = field(default_factory=KeptCodes)
    """Of weights, kept within a `with` statement in which none changes."""

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the rank's parameters by canonical name, only the first of two copies of a tied embedding."""
        found: dict[str, nn.Parameter] = {}
        for model in self.models:
            for name, parameter in model.named_parameters():
                found.setdefault(name, parameter)
        return found

    @cached_property
    def splits(self) -> dict[str, Split]:
        """This rank's part of the parameters that an axis splits unevenly, by canonical name."""
        return uneven_splits(self.plan, self.mesh, self.cfg)

    def shard_batch(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return this rank's positions of `(rows, seq)` tensors; doc_ids stay full, since keys come from all ranks.

        So does a teacher's output, of which each rank has its own positions.
        """
        if self.mesh is None or self.cfg.cp == 1:
            return dict(tensors)
        rank, size = self.mesh.coordinate("cp"), self.cfg.cp
        return {
            name: t if t is None or name in WHOLE else shard_sequence(t, rank, size)
            for name, t in tensors.items()
        }

    def full_sequence(self, own: Tensor) -> Tensor:
        """Return `(rows, seq)` of the full sequence from this rank's positions of it."""
        if self.mesh is None or self.cfg.cp == 1:
            return own
        return in_order(gather(own, 1, self.mesh.cp.get_group()), self.cfg.cp)

    def owns_loss(self) -> bool:
        """Tell whether this is the one rank of its tp group whose loss counts; all of them compute the same loss."""
        return self.mesh is None or self.mesh.coordinate("tp") == 0

    def owns_rows(self) -> bool:
        """Tell whether this is the one rank, of those that compute the same rows of a batch, that counts them."""
        return self.mesh is None or not any(self.mesh.coordinate(axis) for axis in ("pp", "cp", "tp"))

    def owns_balance_loss(self) -> bool:
        """Tell whether the balance loss counts on this rank.

        It does not if another rank of its tp group sends the same tokens to the experts; with expert parallelism each
        rank sends its own.
        """
        return self.owns_loss() or self.cfg.ep > 1

    def total(self, local: Tensor) -> Tensor:
        """Sum `local` over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(local)
        return local

    @torch.no_grad()
    def sum_replicated_gradients(self) -> None:
        """Sum the gradients of tp-replicated parameters over the tp ranks, in one all-reduce.

        Each rank has the partial gradient of its own tokens or heads (see `sharding.local_view`). Call this once per
        step, after the last backward pass.
        """
        if self.mesh is None or self.cfg.tp == 1:
            return
        shares = [
            local_tensor(p.grad)
            for p in self.parameters().values()
            if p.grad is not None and _is_replicated(p)
        ]
        if not shares:
            return
        flat = torch.cat([share.reshape(-1) for share in shares])
        dist.all_reduce(flat, group=self.mesh.tp.get_group())
        for share, part in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
            share.copy_(part.view_as(share))

    def squared_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's share of the squared 2-norm of the full model's `tensors` (float64 scalar).

        Each element of the model counts on one rank, so the sum over ranks is the squared norm of the full model. Where
        only a copy of it is not finite, the result is NaN on the rank that holds it.
        """
        own, copies = [], []
        for name, t in tensors.items():
            local = self.owned(name, t)
            if local is not None:
                own.append(local)
            else:
                copies.append(t.to_local() if isinstance(t, DTensor) else t)
        held_elsewhere = self._sum_of_squares(copies)
        return self._sum_of_squares(own) + (held_elsewhere - held_elsewhere)  # 0 if finite

    def _sum_of_squares(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(torch._foreach_norm(tensors)).to(torch.float64).square().sum()

    def owned(self, name: str, t: Tensor) -> Tensor | None:
        """Return the local shard if this rank is the first of those that hold it, else None."""
        if not isinstance(t, DTensor):  # full on every rank
            return t if self.mesh is None or self.mesh.data_rank == 0 else None
        if name == self.plan.tied_embedding and self.mesh is not None and self.mesh.coordinate("pp") > 0:
            return None  # a copy of the first stage's
        coordinate = t.device_mesh.get_coordinate()
        assert coordinate is not None
        copies = (
            index for index, how in zip(coordinate, t.placements, strict=True) if isinstance(how, Replicate)
        )
        return None if any(copies) else t.to_local()


def parallelize(
    make_model: Callable[[], Decoder],
    plan: Plan,
    mesh: Mesh | None,
    cfg: ParallelConfig,
    *,
    seq_len: int,
    compute_dtype: torch.dtype,
    float8: Float8 | None = None,
    rounding: tuple[str, int] | None = None,
    shards_data: bool = True,
) -> ParallelModel:
    """Apply pipeline, expert, tensor and context parallelism, fp8 or rounding, checkpointing, compilation and FSDP.

    In this order: techniques that split the model come first; fp8 sees the shards that it will multiply; checkpointing
    is inside of compilation; FSDP comes last and shards what the others left.

    Args:
        make_model: returns the full model on the meta device.
        plan: the model's weights and their roles.
        mesh: None in a run of one process.
        seq_len: tokens of a training sequence, which decide with the layers' sizes where a pipeline is cut.
        compute_dtype: dtype in which FSDP gathers parameters.
        float8: how linear layers quantize to fp8; None if they compute in `compute_dtype`.
        rounding: number and group that linear layers round their weights to; None: they do not.
        shards_data: whether FSDP is applied; a model that is not trained does without where nothing is data-parallel.
    """
    kept = KeptCodes()
    models = [make_model()] if mesh is None else list(_stages(make_model, plan, mesh, cfg, seq_len))
    for model in models:
        if mesh is not None and cfg.ep > 1:
            expert_parallel(model, plan, mesh, cfg)
        if mesh is not None and cfg.tp > 1:
            tensor_parallel(model, plan, mesh, cfg)
        if mesh is not None and cfg.cp > 1:
            context_parallel(model, plan, mesh, cfg)
        if float8 is not None:
            float8_linears(model, plan, mesh, cfg, options=float8, kept=kept)
        if rounding is not None:
            fake_quantized_linears(model, plan, mesh, cfg, number=rounding[0], group=rounding[1])
        checkpoint_activations(model, plan, mesh, cfg)
        compile_blocks(model, plan, mesh, cfg)
        if mesh is not None and shards_data:
            fully_shard_blocks(model, plan, mesh, cfg, compute_dtype=compute_dtype)
    pipeline = None if mesh is None or cfg.pp == 1 else Pipeline(cfg, plan, mesh, models, compute_dtype)
    return ParallelModel(cfg, plan, models, mesh, pipeline, kept)


def _stages(
    make_model: Callable[[], Decoder], plan: Plan, mesh: Mesh, cfg: ParallelConfig, seq_len: int
) -> Iterator[Decoder]:
    """Yield the pipeline stages of this rank, or the full model without a pipeline."""
    if cfg.pp == 1:
        yield make_model()
        return
    for stage in own_stages(mesh.coordinate("pp"), cfg):
        model = make_model()
        model.keep_layers(stage_layers(stage, plan, cfg, seq_len))
        if cfg.pp_schedule in SPLIT_BACKWARD:
            keep_products_apart(model)
        yield model


def _is_replicated(parameter: Tensor) -> bool:
    """Tell whether the tp ranks hold the same `parameter`."""
    if not isinstance(parameter, DTensor):
        return False
    placements = dict(zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True))
    return isinstance(placements.get("tp"), Replicate)
