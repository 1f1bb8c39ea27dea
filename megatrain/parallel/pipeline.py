"""Pipeline parallelism: stages of a model, run by the schedules of `torch.distributed.pipelining`.

A stage is the same model class without the other stages' layers, so parameters keep their names. With tied embeddings
the last stage has a copy of the embedding; the two gradients are summed, so that the copies stay equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from megatrain.nn.attention import Attention
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.nn.joined import separate_products
from megatrain.nn.layer import replace_seam
from megatrain.nn.mlp import GatedMLP
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import stage_rank
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.shards import local_tensor
from megatrain.parallel.stage import Stage

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}
Tensors = Mapping[str, Tensor | None]


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Partition `costs` into contiguous non-empty stages, minimizing the most expensive one.

    Returns the first item of each stage.
    """
    n = len(costs)
    sums = [0.0, *accumulate(costs)]
    best = {(end, 1): (sums[end], 0) for end in range(1, n + 1)}
    for count in range(2, stages + 1):
        for end in range(count, n + 1):
            best[end, count] = min(
                (max(best[start, count - 1][0], sums[end] - sums[start]), start)
                for start in range(count - 1, end)
            )
    firsts, end = [], n
    for count in range(stages, 0, -1):
        end = best[end, count][1]
        firsts.append(end)
    return firsts[::-1]


def layer_costs(plan: Plan, seq_len: int) -> list[float]:
    """Return the multiplications that one token costs in each layer; the head counts with the last one.

    Counted are the experts that a token is routed to, and attention over the `seq_len` tokens of a sequence.
    """
    costs = [
        plan.block_products(layer) + attention.products_per_token(seq_len)
        for layer, attention in enumerate(plan.attention)
    ]
    costs[-1] += plan.head_products
    return costs


def stage_layers(stage: int, plan: Plan, cfg: ParallelConfig, seq_len: int) -> range:
    """Return the layers of `stage`: as given by `pp_split`, or chosen for about equal cost."""
    firsts = [0, *cfg.pp_split] if cfg.pp_split else balanced(layer_costs(plan, seq_len), cfg.stages)
    return range(firsts[stage], [*firsts, len(plan.blocks)][stage + 1])


def own_stages(rank: int, cfg: ParallelConfig) -> list[int]:
    """Return the stages that the pipeline's rank `rank` holds, in order."""
    return [stage for stage in range(cfg.stages) if stage_rank(stage, cfg) == rank]


def keep_products_apart(model: Decoder) -> None:
    """Let the layers of `model` multiply one by one, for a backward pass that the schedule splits.

    Products that are differentiated together would be so in each part of it: the gradients of inputs and of weights.
    """
    for module in model.modules():
        if isinstance(module, (Attention, GatedMLP)):
            replace_seam(module, "products", separate_products)


@dataclass
class Pipeline:
    """This rank's pipeline stages and the schedule that runs them."""

    cfg: ParallelConfig
    plan: Plan
    mesh: Mesh
    models: list[Decoder]
    compute_dtype: torch.dtype
    _schedules: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _scale: float = 1.0

    def forward_backward(
        self, tensors: Tensors, micro_batch_size: int, *, scale: float, z_loss: float
    ) -> Tensor:
        """Accumulate the gradients of the loss of all rows, times `scale`.

        Returns the loss on the rank of the last stage, 0 on the others.

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
        self._sum_tied_gradients()
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else self._zero()

    @torch.no_grad()
    def forward(self, tensors: Tensors, *, per_token: bool = False) -> Tensor | None:
        """Return the loss of one micro-batch, or without targets its logits, on the rank of the last stage, else None.

        With `per_token` it is the loss of each token, `(rows, seq)`.

        A rank can start the next one as soon as it has sent its outputs. (The schedules' own `eval` runs
        backward actions in V-shaped ones, which fail: torch 2.13, `get_local_bwd_output`.)
        """
        assert tensors["tokens"] is not None
        rank, group = self.mesh.coordinate("pp"), self.mesh.pp.get_group()
        x = tensors["tokens"]
        positions = self.models[0].cfg.positions_of(x.shape[1])
        shape = (x.shape[0], positions // self.cfg.tp, self._hidden_size)
        for stage, model in zip(own_stages(rank, self.cfg), self.models, strict=True):
            if stage > 0 and (source := stage_rank(stage - 1, self.cfg)) != rank:
                x = torch.empty(shape, dtype=self.compute_dtype, device=x.device)
                dist.recv(x, group=group, group_src=source)
            x = model(x, **_kwargs(tensors, 0.0), per_token=per_token)
            if stage + 1 == self.cfg.stages:
                return x
            if (target := stage_rank(stage + 1, self.cfg)) != rank:
                dist.send(x.contiguous(), group=group, group_dst=target)
        return None

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(self.models[0].parameters()).device)

    def _inputs(self, tensors: Tensors) -> tuple[Tensor | None, ...]:
        return (tensors["tokens"],) if self.mesh.coordinate("pp") == 0 else ()

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scale what the last stage returns, which is its loss: `target` went in with its inputs."""
        return output.sum() * self._scale

    def _schedule(self, tensors: Tensors, micro_batch_size: int) -> Any:
        assert tensors["tokens"] is not None
        rows, seq = tensors["tokens"].shape
        key = (rows, seq, micro_batch_size)
        if key not in self._schedules:
            kind = get_schedule_class(SCHEDULES[self.cfg.pp_schedule])
            stages = self._make_stages(rows // micro_batch_size, micro_batch_size, seq)
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

    def _make_stages(self, micro_batches: int, rows: int, seq: int) -> list[Stage]:
        device = next(self.models[0].parameters()).device
        tokens = torch.empty(rows, seq, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            rows,
            self.models[0].cfg.positions_of(seq) // self.cfg.tp,
            self._hidden_size,
            dtype=self.compute_dtype,
            device="meta",
            requires_grad=True,
        )
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        loss = torch.empty(1, dtype=wide, device="meta", requires_grad=True)
        numbers = own_stages(self.mesh.coordinate("pp"), self.cfg)
        return [
            Stage(
                model,
                number,
                self.cfg.stages,
                device,
                input_args=tokens if number == 0 else hidden,
                output_args=loss if number == self.cfg.stages - 1 else hidden,
                group=self.mesh.pp.get_group(),
                micro_batches=micro_batches,
                zero_stage=self.cfg.zero_stage,
                # Each pass would recompute the activations again: one for the inputs, and one for each weight. And a
                # compiled block has one pass, which cannot be split.
                splits_backward=self.cfg.activation_checkpointing == "none" and not self.cfg.compile,
            )
            for number, model in zip(numbers, self.models, strict=True)
        ]

    @property
    def _hidden_size(self) -> int:
        return self.models[0].cfg.hidden_size

    def _sum_tied_gradients(self) -> None:
        """Sum the gradients of the two copies of a tied embedding."""
        copies = self.tied_embeddings()
        if not copies:
            return
        grads = [local_tensor(copy.grad) for copy in copies if copy.grad is not None]
        if not grads:  # frozen
            return
        if len(grads) == 2:  # a V-shaped schedule: both copies are on this rank
            grads[0].add_(grads[1])
            copies[1].grad = None
            return
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

    def tied_embeddings(self) -> list[nn.Parameter]:
        """Return this rank's copies of the embedding that the first and the last stage share, if tied."""
        tied = self.plan.tied_embedding
        if tied is None:
            return []
        numbers = own_stages(self.mesh.coordinate("pp"), self.cfg)
        named = [dict(model.named_parameters()) for model in self.models]
        ends = (0, self.cfg.stages - 1)
        return [parts[tied] for number, parts in zip(numbers, named, strict=True) if number in ends]

    def sync_tied_embeddings(self) -> None:
        """Give the second copy of a tied embedding on this rank the first one's values."""
        copies = self.tied_embeddings()
        if len(copies) == 2:
            copies[1].data.copy_(copies[0].data)


def _kwargs(tensors: Tensors, z_loss: float) -> dict[str, Any]:
    names = ("targets", "positions", "doc_ids", "keep", "token_numbers", "factors", "teacher")
    return {"z_loss": z_loss} | {name: tensors[name] for name in names if tensors.get(name) is not None}
