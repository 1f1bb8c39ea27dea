"""Planting of the faults of `faults.py` in this process, around a run of a few steps; nothing is left behind.

Faults are planted at functions of `megatrain/parallel`, and of torch where that communicates for them, so the
technique runs as it is but for the error. All ranks make the same calls still: no fault can block a run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatrain.data.loader import Loader, StepBatch
from megatrain.parallel import apply, collectives, context, expert, fsdp, pipeline, tensor
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.layout import AXES, stage_rank
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.pipeline import Pipeline
from megatrain.train import step
from megatrain.train.config import Config
from megatrain.train.state import TrainState

Plant = Callable[[Config, Mesh], AbstractContextManager[None]]


def planted(fault: str, cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    """Return a context in which this rank has the fault of that name; build the run's state inside of it.

    Raises:
        ValueError: there is none of that name.
    """
    if fault not in PLANTS:
        raise ValueError(f"there is no fault {fault!r}")
    return PLANTS[fault](cfg, mesh)


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put `make(original)` in the place of `owner.name` in the `with` block."""
    original = owner.__dict__[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _without_sums(mesh: DeviceMesh) -> Iterator[None]:
    """Let FSDP keep this rank's own gradients in the place of the sums over replicate and shard of `mesh`."""
    replicas, shards = (mesh.get_group(axis).group_name for axis in ("replicate", "shard"))

    def keep_part(original: Any) -> Any:
        def reduce_scatter(*args: Any, **options: Any) -> Any:
            group = options.get("group")  # FSDP names it
            if group is None or group.group_name != shards:
                return original(*args, **options)
            output, whole = args or (options["output"], options["input"])
            return output.copy_(whole.chunk(group.size())[group.rank()])

        return reduce_scatter

    def keep(original: Any) -> Any:
        def all_reduce(*args: Any, **options: Any) -> Any:
            group = options.get("group")
            is_ours = group is not None and group.group_name == replicas
            return None if is_ours else original(*args, **options)

        return all_reduce

    scatter = "reduce_scatter_single"  # so named since torch 2.13
    scatter = scatter if hasattr(dist, scatter) else "reduce_scatter_tensor"
    with _replaced(dist, scatter, keep_part), _replaced(dist, "all_reduce", keep):
        yield


def _drop_gradient_sum(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    return _without_sums(mesh.data)


def _drop_expert_sum(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    assert mesh.experts is not None
    return _without_sums(mesh.experts)


def _drop_scatter_sum(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    return _replaced(tensor, "scatter_sum", lambda original: collectives.own_part)


def _drop_replicated_sum(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    return _replaced(ParallelModel, "sum_replicated_gradients", lambda original: lambda self: None)


@contextmanager
def _drop_context_exchange(cfg: Config, mesh: Mesh) -> Iterator[None]:
    def repeat(x: Tensor, dim: int, group: Any) -> Tensor:
        return torch.cat([x] * group.size(), dim)

    with (
        _replaced(context, "gather_from", lambda original: repeat),
        _replaced(context, "exchange", lambda original: lambda x, group: x),
        _replaced(context, "shift", lambda original: lambda x, group: x),
    ):
        yield


def _drop_tied_sum(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    return _replaced(Pipeline, "_sum_tied_gradients", lambda original: lambda self: None)


def _holds_last_stage(cfg: Config, mesh: Mesh) -> bool:
    return cfg.parallel.pp == 1 or mesh.coordinate("pp") == stage_rank(cfg.parallel.stages - 1, cfg.parallel)


def _is_last_with_loss(cfg: Config, mesh: Mesh) -> bool:
    """Tell whether this rank is the last one of those that hold the last stage, or the full model."""
    others = (axis for axis in AXES if axis != "pp")
    return _holds_last_stage(cfg, mesh) and all(
        mesh.coordinate(axis) == getattr(cfg.parallel, axis) - 1 for axis in others
    )


def _double_tokens(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    factor = 2 if _is_last_with_loss(cfg, mesh) else 1

    def double(original: Any) -> Any:
        def step_batch(self: Loader, step: int) -> StepBatch:
            batch = original(self, step)
            return replace(batch, valid_tokens=factor * batch.valid_tokens)

        return step_batch

    return _replaced(Loader, "step_batch", double)


@contextmanager
def _keep_old_shard(cfg: Config, mesh: Mesh) -> Iterator[None]:
    if dist.get_rank() != dist.get_world_size() - 1:
        yield
        return
    old: dict[str, Tensor] = {}

    def before_update(original: Any) -> Any:
        def accumulate_gradients(state: TrainState, *args: Any, **options: Any) -> Tensor:
            old.update({name: p.detach().clone() for name, p in state.weights.parameters.items()})
            loss: Tensor = original(state, *args, **options)
            return loss

        return accumulate_gradients

    def after_update(original: Any) -> Any:
        @torch.no_grad()
        def sync_model_weights(state: TrainState, **_: bool) -> None:
            for name, parameter in state.weights.parameters.items():
                parameter.copy_(old[name])
            original(state)

        return sync_model_weights

    with (
        _replaced(step, "accumulate_gradients", before_update),
        _replaced(TrainState, "sync_model_weights", after_update),
    ):
        yield


def _keep_old_gather(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    def then_gather(original: Any) -> Any:
        def accumulate_gradients(state: TrainState, *args: Any, **options: Any) -> Tensor:
            loss: Tensor = original(state, *args, **options)
            for model in state.parallel.models:
                fsdp.unshard(model)  # before the update, and nothing frees it until it is used
            return loss

        return accumulate_gradients

    return _replaced(step, "accumulate_gradients", then_gather)


def _reverse_gather(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    def reverse(original: Any) -> Any:
        def gather(x: Tensor, dim: int, group: Any) -> Tensor:
            return torch.cat(original(x, dim, group).chunk(group.size(), dim)[::-1], dim)

        return gather

    return _replaced(collectives, "gather", reverse)


def _take_adjacent_chunks(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    def adjacent(x: Tensor, rank: int, size: int) -> Tensor:
        return x.chunk(size, context.SEQ)[rank]

    return _replaced(apply, "shard_sequence", lambda original: adjacent)


def _reverse_stages(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    last = cfg.parallel.stages - 1

    def reverse(original: Any) -> Any:
        def stage_layers(stage: int, *args: Any) -> range:
            found: range = original(stage if stage in (0, last) else last - stage, *args)
            return found

        return stage_layers

    return _replaced(apply, "stage_layers", reverse)


def _shift_targets(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    rows = cfg.resolved_micro_batch_size if _holds_last_stage(cfg, mesh) else 0

    def shift(original: Any) -> Any:
        def kwargs(tensors: Any, z_loss: float) -> Any:
            found = original(tensors, z_loss)
            return found | {"targets": found["targets"].roll(rows, 0)}

        return kwargs

    return _replaced(pipeline, "_kwargs", shift)


def _send_to_next(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    def shift(original: Any) -> Any:
        def dispatch(group: Any, shares: list[range], tokens: Tensor, indices: Tensor, *args: Any) -> Tensor:
            moved = (indices + len(shares[0])) % shares[-1].stop
            found: Tensor = original(group, shares, tokens, moved, *args)
            return found

        return dispatch

    return _replaced(expert, "_dispatch", shift)


def _leave_unscaled(cfg: Config, mesh: Mesh) -> AbstractContextManager[None]:
    def unscaled(original: Any) -> Any:
        def dispatch(
            group: Any, shares: list[range], tokens: Tensor, indices: Tensor, weights: Tensor, experts: Any
        ) -> Tensor:
            found: Tensor = original(group, shares, tokens, indices, torch.ones_like(weights), experts)
            return found

        return dispatch

    return _replaced(expert, "_dispatch", unscaled)


PLANTS: dict[str, Plant] = {
    "dropped_gradient_sum": _drop_gradient_sum,
    "dropped_expert_sum": _drop_expert_sum,
    "dropped_scatter_sum": _drop_scatter_sum,
    "dropped_replicated_sum": _drop_replicated_sum,
    "dropped_context_exchange": _drop_context_exchange,
    "dropped_tied_sum": _drop_tied_sum,
    "doubled_tokens": _double_tokens,
    "stale_shard": _keep_old_shard,
    "stale_gather": _keep_old_gather,
    "wrong_gather_order": _reverse_gather,
    "wrong_chunk_order": _take_adjacent_chunks,
    "wrong_stage_order": _reverse_stages,
    "wrong_micro_batch_order": _shift_targets,
    "wrong_expert_rank": _send_to_next,
    "unscaled_expert": _leave_unscaled,
}
"""What plants each fault; `faults.FAULTS` says what it is and which layouts it can reach."""
