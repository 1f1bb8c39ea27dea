"""Pipeline parallelism: stages of a model, and their schedules by `torch.distributed.pipelining`.

A stage is the same model class with the other stages' parts left out, so parameters keep their names. With tied
embeddings the last stage has a copy of the table; the two gradients are summed, and so the copies stay equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import stage_rank
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shards import local_tensor

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
TABLE = "embed.weight"
Tensors = Mapping[str, Tensor | None]


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """First item of each stage when `costs` is cut into `stages` runs, none empty, the dearest as cheap as can be."""
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(end, 1): (sums[end], 0) for end in range(1, n + 1)}
    for count in range(2, stages + 1):
        for end in range(count, n + 1):
            best[end, count] = min(
                (max(best[cut, count - 1][0], sums[end] - sums[cut]), cut) for cut in range(count - 1, end)
            )
    firsts, end = [], n
    for count in range(stages, 0, -1):
        end = best[end, count][1]
        firsts.append(end)
    return firsts[::-1]


def layer_costs(model: nn.Module) -> list[float]:
    """Multiplications a token of each layer; the loss head's count with the last one."""
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    costs = [float(sum(p.numel() for p in block.parameters() if p.ndim > 1)) for block in layers.values()]
    table: Tensor = model.embed.weight  # type: ignore[union-attr, assignment]
    costs[-1] += table.numel()
    return costs


def keep_stage(model: nn.Module, stage: int, firsts: Sequence[int]) -> None:
    """Remove from the whole `model` what is not in `stage`; `firsts` are all stages' first layers."""
    layers: nn.ModuleDict = model.layers  # type: ignore[assignment]
    bounds = [*firsts, len(layers)]
    for index in list(layers):
        if not bounds[stage] <= int(index) < bounds[stage + 1]:
            del layers[index]
    is_last = stage == len(firsts) - 1
    if stage > 0:
        model.pos_embed = None  # type: ignore[assignment]
        if not (is_last and model.head is None):
            model.embed = None  # type: ignore[assignment]
    if not is_last:
        model.norm = None  # type: ignore[assignment]
        model.head = None  # type: ignore[assignment]


def own_stages(rank: int, cfg: ParallelConfig) -> list[int]:
    """Stages of the pipeline's rank `rank`, in order."""
    return [stage for stage in range(cfg.stages) if stage_rank(stage, cfg) == rank]


@dataclass
class Pipeline:
    """This rank's stages, and how a step goes through them."""

    cfg: ParallelConfig
    mesh: Mesh
    models: list[nn.Module]
    hidden_size: int
    compute_dtype: torch.dtype
    is_tied: bool = False
    """Is the loss head the embedding?"""
    _schedules: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _scale: float = 1.0

    def forward_backward(
        self, tensors: Tensors, micro_batch_size: int, *, scale: float, z_loss: float
    ) -> Tensor:
        """Gradients of the loss of all rows, times `scale`; returns the loss (0 but on the last stage's rank).

        Args:
            tensors: tokens, targets, positions and doc_ids `(rows, seq)` of this rank.
        """
        self._scale = scale
        schedule = self._schedule(tensors, micro_batch_size)
        losses: list[Tensor] = []
        schedule.step(
            *self._inputs(tensors),
            **_kwargs(tensors, z_loss),
            target=tensors["targets"],
            losses=losses,
            return_outputs=False,
        )
        self._join_tables()
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else self._zero()

    @torch.no_grad()
    def forward(self, tensors: Tensors) -> Tensor:
        """The summed loss of one micro-batch (0 but on the last stage's rank).

        A rank is free for the next one as soon as it has sent its outputs on. (The schedules' own `eval` runs
        backward actions in V-shaped ones, which fail: torch 2.13, `get_local_bwd_output`.)
        """
        assert self.mesh.pp is not None
        assert tensors["tokens"] is not None
        rank, group = self.mesh.coordinate("pp"), self.mesh.pp.get_group()
        x = tensors["tokens"]
        shape = (x.shape[0], x.shape[1] // self.cfg.tp, self.hidden_size)
        for stage, model in zip(own_stages(rank, self.cfg), self.models, strict=True):
            if stage > 0 and (source := stage_rank(stage - 1, self.cfg)) != rank:
                x = torch.empty(shape, dtype=self.compute_dtype, device=x.device)
                dist.recv(x, group=group, group_src=source)
            x = model(x, **_kwargs(tensors, 0.0))
            if stage + 1 == self.cfg.stages:
                return x.sum()
            if (target := stage_rank(stage + 1, self.cfg)) != rank:
                dist.send(x.contiguous(), group=group, group_dst=target)
        return self._zero()

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(self.models[0].parameters()).device)

    def _inputs(self, tensors: Tensors) -> tuple[Tensor | None, ...]:
        return (tensors["tokens"],) if self.mesh.coordinate("pp") == 0 else ()

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The last stage returns its loss; `target` went in with its inputs."""
        return output.sum() * self._scale

    def _schedule(self, tensors: Tensors, micro_batch_size: int) -> Any:
        rows, seq = tensors["tokens"].shape  # type: ignore[union-attr]
        key = (rows, seq, micro_batch_size)
        if key not in self._schedules:
            kind = get_schedule_class(SCHEDULES[self.cfg.pp_schedule])
            stages = self._make_stages(micro_batch_size, seq)
            options = {
                "n_microbatches": rows // micro_batch_size,
                "loss_fn": self._loss,
                "scale_grads": False,
            }
            if issubclass(kind, PipelineScheduleSingle):
                self._schedules[key] = kind(stages[0], **options)
            else:
                assert issubclass(kind, PipelineScheduleMulti)
                self._schedules[key] = kind(stages, **options)
        return self._schedules[key]

    def _make_stages(self, rows: int, seq: int) -> list[PipelineStage]:
        assert self.mesh.pp is not None
        device = next(self.models[0].parameters()).device
        tokens = torch.empty(rows, seq, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            rows,
            seq // self.cfg.tp,
            self.hidden_size,
            dtype=self.compute_dtype,
            device="meta",
            requires_grad=True,
        )
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        loss = torch.empty(1, dtype=wide, device="meta", requires_grad=True)
        numbers = own_stages(self.mesh.coordinate("pp"), self.cfg)
        return [
            PipelineStage(
                model,
                number,
                self.cfg.stages,
                device,
                input_args=tokens if number == 0 else hidden,
                output_args=loss if number == self.cfg.stages - 1 else hidden,
                group=self.mesh.pp.get_group(),
            )
            for number, model in zip(numbers, self.models, strict=True)
        ]

    def _join_tables(self) -> None:
        """Sum the gradients of the two copies of a tied table."""
        copies = self.tables()
        if not copies:
            return
        grads = [local_tensor(copy.grad) for copy in copies if copy.grad is not None]
        if len(grads) == 2:  # a V-shaped schedule: both are here, and the second only follows the first
            grads[0].add_(grads[1])
            copies[1].grad = None
            return
        assert self.mesh.pp is not None
        ends = (0, stage_rank(self.cfg.stages - 1, self.cfg))
        other = ends[1] if self.mesh.coordinate("pp") == ends[0] else ends[0]
        group, theirs = self.mesh.pp.get_group(), torch.empty_like(grads[0])
        operations = [
            dist.P2POp(dist.isend, grads[0].contiguous(), group=group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        grads[0].add_(theirs)

    def tables(self) -> list[nn.Parameter]:
        """This rank's copies of a table that the first and the last stage share; none if it is not tied."""
        if not self.is_tied:
            return []
        numbers = own_stages(self.mesh.coordinate("pp"), self.cfg)
        named = [dict(model.named_parameters()) for model in self.models]
        ends = (0, self.cfg.stages - 1)
        return [parts[TABLE] for number, parts in zip(numbers, named, strict=True) if number in ends]

    def copy_tables(self) -> None:
        """Give the second copy of a tied table on this rank the first one's values."""
        copies = self.tables()
        if len(copies) == 2:
            copies[1].data.copy_(copies[0].data)


def _kwargs(tensors: Tensors, z_loss: float) -> dict[str, Any]:
    names = ("targets", "positions", "doc_ids")
    return {"z_loss": z_loss} | {name: tensors[name] for name in names if tensors[name] is not None}
