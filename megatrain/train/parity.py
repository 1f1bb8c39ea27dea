"""A few training steps of a config in one layout, with everything that must be equal in all layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from megatrain.data.loader import StepBatch, ignored_batch, validation_batches
from megatrain.data.store import TokenSource
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import Mesh, make_mesh
from megatrain.parallel.sharding import Split
from megatrain.parallel.shards import full_tensor
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.state import TrainState
from megatrain.train.step import accumulate_gradients, train_step

Arrays = dict[str, np.ndarray]
FAULTS = ("dropped_reduction", "doubled_tokens")
"""Faults that can be injected to check that they are detected."""


@dataclass(frozen=True)
class Trace:
    """Results of a run; arrays are full, by canonical parameter name."""

    losses: list[float]
    grad_norms: list[float]
    digests: list[str]
    initial: Arrays
    gradients: Arrays
    """Gradients of the first step, before clipping."""
    final: Arrays
    eval_loss: float
    """Validation loss after the last step, in nats per token."""


def trace(cfg: Config, store: TokenSource, steps: int, fault: str | None = None) -> Trace:
    """Train `steps` steps of `cfg` on this rank of the default process group (or alone).

    `fault`, one of `FAULTS`, injects an error in a run of several processes. The first rank of each pipeline stage
    returns the arrays of that stage; other ranks return none.
    """
    device = torch.device("cpu")
    mesh = make_mesh(cfg.parallel, device) if world_size(cfg.parallel) > 1 else None
    state = build_state(cfg, device, mesh)
    splits = state.parallel.splits
    initial = full_arrays(state.weights.parameters, mesh, splits)
    loader = build_loader(cfg, store, mesh)
    accumulate_gradients(state, _broken(loader.step_batch(0), fault, mesh), cfg)
    gradients = full_arrays(_gradients(state), mesh, splits)
    state.weights.zero_gradients()
    losses, norms, digests = [], [], []
    for step in range(steps):
        batch = _broken(loader.step_batch(step), fault, mesh)
        stats = train_step(state, batch, cfg, lr=cfg.optim.lr)
        losses.append(stats.loss.item())
        norms.append(stats.grad_norm.item())
        digests.append(batch.digest)
    final = full_arrays(state.weights.parameters, mesh, splits)
    return Trace(losses, norms, digests, initial, gradients, final, _validate(state, cfg, store))


def _validate(state: TrainState, cfg: Config, store: TokenSource) -> float:
    """Return the loss of five rows: an odd number, so that data-parallel ranks run out of them at different times."""
    batches = validation_batches(
        store,
        seq_len=cfg.seq_len,
        tokens=5 * cfg.seq_len,
        micro_batch_size=1,
        mask_documents=cfg.data.mask_documents,
    )
    return evaluate(state.parallel, list(batches), None).loss


def _broken(batch: StepBatch, fault: str | None, mesh: Mesh | None) -> StepBatch:
    """Return `batch` with the error that `fault` names."""
    if fault == "doubled_tokens":
        return replace(batch, valid_tokens=2 * batch.valid_tokens)
    if fault == "dropped_reduction" and mesh is not None and dist.get_rank() == dist.get_world_size() - 1:
        # The last rank's contribution to every sum is lost.
        return replace(batch, micro_batches=[ignored_batch(part) for part in batch.micro_batches])
    return batch


def _gradients(state: TrainState) -> dict[str, Tensor]:
    return {name: p.grad for name, p in state.weights.parameters.items() if p.grad is not None}


def full_arrays(tensors: Mapping[str, Tensor], mesh: Mesh | None, splits: Mapping[str, Split]) -> Arrays:
    """Return `tensors` in full (float64) on the first rank of each pipeline stage; nothing on the others."""
    full = {name: full_tensor(t, splits.get(name)) for name, t in tensors.items()}
    if mesh is not None and any(mesh.coordinate(axis) for axis in ("dp_replicate", "dp_shard", "cp", "tp")):
        return {}
    return {name: t.detach().to(torch.float64).numpy().copy() for name, t in full.items()}


def merged(parts: list[Trace]) -> Trace:
    """Merge the ranks' traces into one.

    Raises:
        ValueError: ranks that must agree do not, or copies of a parameter differ.
    """
    first = parts[0]
    arrays: list[Arrays] = []
    for kind in ("initial", "gradients", "final"):
        found: Arrays = {}
        for part in parts:
            for name, array in getattr(part, kind).items():
                if not np.array_equal(found.setdefault(name, array), array):
                    raise ValueError(f"the copies of {name} differ in their {kind} values")
        arrays.append(found)
    for part in parts:
        if _reported(part) != _reported(first):
            raise ValueError("ranks report different losses, norms or samples")
    initial, gradients, final = arrays
    return replace(first, initial=initial, gradients=gradients, final=final)


def _reported(part: Trace) -> tuple[object, ...]:
    return part.losses, part.grad_norms, part.digests, part.eval_loss


def relative_errors(found: Arrays, truth: Arrays) -> dict[str, float]:
    """Return the largest difference of each parameter, relative to the largest magnitude of its true values.

    That magnitude is taken as a tenth of the full model's largest at least: a gradient may be zero but for rounding
    (a key's bias shifts all scores of a query alike), and then says nothing.
    """
    largest = {name: float(np.abs(values).max(initial=0.0)) for name, values in truth.items()}
    least = max(largest.values()) / 10
    return {
        name: float(np.abs(found[name] - values).max(initial=0.0)) / max(largest[name], least)
        for name, values in truth.items()
    }
