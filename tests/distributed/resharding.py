"""Runs that are saved in one layout and go on in another."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.data.store import TokenSource
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.group import JoinedProcesses
from megatrain.runtime.meetings import Meetings
from megatrain.runtime.processes import Processes
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.parity import Arrays, full_arrays
from megatrain.train.state import TrainState
from megatrain.train.step import train_step

BEFORE, AFTER = 2, 3
"""Steps before the checkpoint, and after it."""


@dataclass(frozen=True)
class Part:
    """What one rank has seen of the steps after the checkpoint."""

    losses: list[float]
    grad_norms: list[float]
    digests: list[str]
    start: Arrays
    """Weights and averages (`ema.`) when these steps begin, in full, of the rank's pipeline stages."""
    end: Arrays


def go_on(cfg: Config, store: TokenSource, source: str | None, target: str | None) -> Part:
    """Train on this rank: from the checkpoint in `source` or the beginning; save in `target` after `BEFORE` steps.

    With a source, `AFTER` steps follow it; with neither, `BEFORE + AFTER` are taken, and the last `AFTER` returned.
    """
    processes = joined_processes() if dist.is_initialized() else Processes()
    mesh = make_mesh(cfg.parallel, torch.device("cpu")) if world_size(cfg.parallel) > 1 else None
    state = build_state(cfg, torch.device("cpu"), mesh)
    loader = build_loader(cfg, store, mesh)
    if source is not None:
        tensors = state.tensors()
        found = Checkpointer(Path(source), CheckpointConfig(), processes).load(tensors)
        assert found is not None
        state.restore(found.state, tensors)
    found_so_far = Part([], [], [], {}, {})
    start: Arrays = {}
    while state.step < BEFORE + (0 if target is not None else AFTER):
        if state.step == BEFORE:
            start = _arrays(state)
        batch = loader.step_batch(state.step)
        is_after = state.step >= BEFORE
        stats = train_step(state, batch, cfg, lr=cfg.optim.lr)
        if is_after:
            found_so_far.losses.append(stats.loss.item())
            found_so_far.grad_norms.append(stats.grad_norm.item())
            found_so_far.digests.append(batch.digest)
    if target is not None:
        Checkpointer(Path(target), CheckpointConfig(), processes).save(
            state.step, state.tensors(), state.metadata()
        )
    end = _arrays(state)
    return Part(found_so_far.losses, found_so_far.grad_norms, found_so_far.digests, start, end)


def _arrays(state: TrainState) -> Arrays:
    splits = state.parallel.splits
    averages = {} if state.average is None else full_arrays(state.average.averages, splits)
    return full_arrays(state.weights.parameters, splits) | {f"ema.{k}": v for k, v in averages.items()}


def joined_processes(timeout_s: float = 60) -> JoinedProcesses:
    """The ranks of the default process group, as the processes of a run."""
    rank, size = dist.get_rank(), dist.get_world_size()
    meetings = Meetings(dist.distributed_c10d._get_default_store(), rank, size, timeout_s=timeout_s)
    return JoinedProcesses(rank, size, rank, size, dist.new_group(backend="gloo"), meetings=meetings)
