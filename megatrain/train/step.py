"""The training step: forward, backward and optimizer update over one global batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.profiler import record_function

from megatrain.data.loader import Batch, StepBatch
from megatrain.engines.engine import Engine, Partitioned
from megatrain.nn.balance import balance_experts, begin_balance, forget_expert_counts
from megatrain.nn.classifier import chosen_labels
from megatrain.optim.clip import clip_factor
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.fsdp import before_micro_batch
from megatrain.train.config import Config
from megatrain.train.placing import on_device
from megatrain.train.state import TrainState

Accepts = Callable[[float, float], bool]
"""Told a step's loss and gradient norm, says whether the weights are to be updated; the same on every rank."""

OnGradients = Callable[[Mapping[str, Tensor]], None]
"""Shown the gradients of a step, by canonical name, before they are clipped."""


@dataclass(slots=True)
class StepStats:
    """Results of one step, equal on all ranks. They stay on the device until `read`, which synchronizes once."""

    values: Tensor
    """`(3 + names,)` float64: loss, gradient norm, number of ranks that want to stop, further metrics."""
    was_taken: bool = True
    """Whether the weights were updated."""
    names: tuple[str, ...] = ()
    """Further metrics, of the objective."""
    _read: list[float] | None = None

    @property
    def loss(self) -> Tensor:
        """Nats per token: mean over the valid tokens of the global batch, z-loss included."""
        return self.values[0]

    @property
    def grad_norm(self) -> Tensor:
        """2-norm of the full model's gradient, before clipping."""
        return self.values[1]

    def read(self) -> tuple[float, float, bool]:
        """Return loss, gradient norm, and whether any rank wants to stop, in one copy to the host."""
        loss, grad_norm, stop, *_ = self._all()
        return loss, grad_norm, stop > 0

    def more(self) -> dict[str, float]:
        """Return the further metrics by name."""
        return dict(zip(self.names, self._all()[3:], strict=True))

    def _all(self) -> list[float]:
        if self._read is None:
            self._read = self.values.tolist()
        return self._read


def loss_sum(parallel: ParallelModel, batch: Batch, *, z_loss: float = 0.0) -> Tensor:
    """Return the loss in nats, summed over this rank's valid tokens of `batch` (float32 scalar on the device)."""
    tensors = on_device(parallel, batch)
    loss: Tensor = parallel.models[0](tensors.pop("tokens"), **tensors, z_loss=z_loss)
    return loss


def train_step(
    state: TrainState,
    batch: StepBatch,
    cfg: Config,
    *,
    lr: float,
    wants_stop: Callable[[], bool] = lambda: False,
    accepts: Accepts | None = None,
    on_gradients: OnGradients | None = None,
) -> StepStats:
    """Take one optimizer step at learning rate `lr` over the global batch.

    `wants_stop` is asked late in the step, and all ranks learn together whether any wants to: so they stop together.
    Where `accepts` says no, the step counts and its batch is used up, but nothing is updated. An engine that updates
    partitioned weights itself does not ask, nor show its gradients to `on_gradients`.

    Each micro-batch's loss is its sum over valid tokens divided by the number of valid tokens of the *global*
    batch, so the split into micro-batches and over ranks only affects rounding.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    for round_ in range(1 if state.objective is None else state.objective.rounds):
        sums = accumulate_gradients(state, batch, cfg, round_=round_)
        with record_function("optimizer"):  # the ranges of this file are classes in observe/profile.py
            stats = _update(state, cfg, sums, wants_stop(), accepts, on_gradients)
            if stats.was_taken:
                balance_experts(state.parallel.models, cfg.model, state.parallel.total)
                if state.average is not None:
                    state.average.update(state.weights.trained)
    state.step += 1
    state.tokens += batch.valid_tokens if state.objective is None else state.objective.trained_tokens(batch)
    return stats


def _update(
    state: TrainState,
    cfg: Config,
    sums: Tensor,
    wants_stop: bool,
    accepts: Accepts | None,
    on_gradients: OnGradients | None,
) -> StepStats:
    """Clip the gradients and update the weights, unless `accepts` says no.

    The host waits for the device before the update then, in place of after it.

    Args:
        sums: this rank's shares of the loss, and of the objective's further metrics.
    """
    stop = torch.full_like(sums[:1], float(wants_stop))
    if isinstance(state.engine, Partitioned):
        grad_norm = state.engine.update()
        loss, stop = state.parallel.total(torch.cat([sums[:1], stop]))
        return StepStats(torch.stack([loss, grad_norm, stop]))
    parallel, weights = state.parallel, state.weights.parameters
    gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
    if on_gradients is not None:
        on_gradients(gradients)
    # One all-reduce for all scalars: small collectives are bound by latency.
    squared_norm = parallel.squared_norm(gradients)[None]
    totals = parallel.total(torch.cat([sums[:1], squared_norm, stop, sums[1:]]))
    grad_norm = totals[1].sqrt()
    names = () if state.objective is None else state.objective.names
    stats = StepStats(torch.cat([totals[:1], grad_norm[None], totals[2:]]), names=names)
    stats.was_taken = accepts is None or accepts(*stats.read()[:2])
    if stats.was_taken:
        state.optimizer.step(clip_factor(grad_norm, cfg.optim.clip_norm))
    else:
        forget_expert_counts(parallel.models)
    state.weights.zero_gradients()
    if stats.was_taken:
        state.sync_model_weights(are_written=state.optimizer.writes_copies)
    return stats


def accumulate_gradients(state: TrainState, batch: StepBatch, cfg: Config, *, round_: int = 0) -> Tensor:
    """Accumulate the gradients of the global batch in the weights.

    Returns this rank's shares of the loss, and of the objective's further metrics, `(1 + names,)` float64.
    """
    parallel = state.parallel
    if state.privacy is not None:
        loss_of = partial(loss_sum, parallel, z_loss=cfg.train.z_loss)
        return state.privacy.accumulate(parallel, state.weights, batch, loss_of)[None]
    if state.engine is not None:
        return _accumulate_in_engine(state.engine, parallel, batch, cfg)[None]
    weighed = None if state.objective is None else state.objective.weigh(parallel, batch, round_)
    batch = batch if weighed is None else weighed.batch
    begin_balance(parallel.models, parallel.owns_balance_loss() / max(batch.valid_tokens, 1))
    with parallel.float8_codes:
        loss = (_accumulate if parallel.pipeline is None else _accumulate_in_pipeline)(state, batch, cfg)
    parallel.sum_replicated_gradients()
    if cfg.lora.base != "full" and parallel.mesh is not None:
        for parameter in state.weights.trained.values():  # whole on each rank: no FSDP sums them
            dist.all_reduce(parameter.grad)
    if weighed is not None and weighed.sums is not None:
        return weighed.sums
    return (loss if parallel.owns_loss() else torch.zeros_like(loss))[None]


def _accumulate(state: TrainState, batch: StepBatch, cfg: Config) -> Tensor:
    """Run forward and backward of this rank's micro-batches in turn; returns its share of the loss (float64)."""
    parallel = state.parallel
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)  # a long sum of small terms
    for n, part in enumerate(batch.micro_batches):
        is_last = n == len(batch.micro_batches) - 1
        before_micro_batch(parallel.models[0], is_last=is_last, zero_stage=parallel.cfg.zero_stage)
        loss = loss_sum(parallel, part, z_loss=cfg.train.z_loss) / max(batch.valid_tokens, 1)
        loss.backward()
        with record_function("gradients"):
            state.weights.collect_gradients()
        total += loss.detach()
    return total


def _accumulate_in_engine(engine: Engine, parallel: ParallelModel, batch: StepBatch, cfg: Config) -> Tensor:
    """Do as `accumulate_gradients`; the engine's mean over ranks undoes its factor on the loss."""
    scale = engine.ranks / max(batch.valid_tokens, 1)
    begin_balance(parallel.models, scale)
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for n, part in enumerate(batch.micro_batches):
        is_last = n == len(batch.micro_batches) - 1
        tensors = on_device(parallel, part)
        total += engine.forward_backward(tensors, scale=scale, z_loss=cfg.train.z_loss, is_last=is_last)
    return total / engine.ranks


def _accumulate_in_pipeline(state: TrainState, batch: StepBatch, cfg: Config) -> Tensor:
    """Do as `_accumulate`, with all micro-batches at once through the pipeline's schedule."""
    parallel = state.parallel
    assert parallel.pipeline is not None
    parts = [on_device(parallel, part) for part in batch.micro_batches]
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    rows = {name: None if t[0] is None else torch.cat(cast(list[Tensor], t)) for name, t in columns.items()}
    scale = 1 / max(batch.valid_tokens, 1)
    loss = parallel.pipeline.forward_backward(
        rows, cfg.resolved_micro_batch_size, scale=scale, z_loss=cfg.train.z_loss
    )
    return loss.to(torch.float64)


@torch.no_grad()
def right_documents(parallel: ParallelModel, batch: Batch) -> Tensor:
    """Count this rank's documents of `batch` all of whose labels a classifier gets right, on one rank of a tp group."""
    tensors = on_device(parallel, batch)
    targets = tensors.pop("targets")
    logits = (
        parallel.models[0](tensors.pop("tokens"), **tensors)
        if parallel.pipeline is None
        else parallel.pipeline.forward(tensors)
    )
    if logits is None or not parallel.owns_loss():
        return torch.zeros((), dtype=torch.float64, device=parallel.device)
    assert targets is not None
    classifier = parallel.models[-1].cfg.classifier
    found = chosen_labels(logits, is_multi=classifier is not None and classifier.multi_label is True)
    return ((found == targets) & (targets >= 0)).sum().to(torch.float64)


@torch.no_grad()
def evaluation_loss(parallel: ParallelModel, batch: Batch) -> Tensor:
    """Return the loss in nats summed over this rank's valid tokens of `batch`, on one rank of each tp group."""
    if parallel.pipeline is None:
        loss: Tensor | None = loss_sum(parallel, batch)
    else:
        loss = parallel.pipeline.forward(on_device(parallel, batch))
    if loss is None or not parallel.owns_loss():
        return torch.zeros((), dtype=torch.float64, device=parallel.device)
    return loss.sum().to(torch.float64)
