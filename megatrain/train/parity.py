"""A few training steps of a config in one layout, with everything that must be equal in all layouts."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatrain.data.loader import Batch, validation_batches
from megatrain.data.store import TokenSource
from megatrain.data.tokenizer import ByteTokenizer
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import Mesh, make_mesh
from megatrain.parallel.packed_base import pack_base
from megatrain.parallel.sharding import Split
from megatrain.parallel.shards import full_tensor
from megatrain.train.build import build_loader, build_state, packed
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.objectives import begin_objective, build_objective
from megatrain.train.planting import planted
from megatrain.train.state import TrainState
from megatrain.train.step import accumulate_gradients, train_step

Arrays = dict[str, np.ndarray]
KINDS = ("initial", "gradients", "final", "averages")
"""Fields of a `Trace` that hold arrays."""


class DisagreementError(ValueError):
    """Ranks that must agree do not."""


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
    averages: Arrays
    """Moving averages of the weights after the last step; empty if the config keeps none."""
    eval_loss: float
    """Validation loss after the last step, in nats per token."""
    copies: dict[str, str]
    """Hashes of the arrays of a rank that are copies of another rank's, by field and name."""


def trace(cfg: Config, store: TokenSource, steps: int, fault: str | None = None) -> Trace:
    """Train `steps` steps of `cfg` on this rank of the default process group (or alone).

    The first rank of each pipeline stage returns the arrays of that stage; other ranks return hashes of theirs.

    Args:
        fault: name of an error to plant in a run of several processes (`faults.FAULTS`); None for none.
    """
    mesh = make_mesh(cfg.parallel, torch.device("cpu")) if world_size(cfg.parallel) > 1 else None
    with nullcontext() if fault is None or mesh is None else planted(fault, cfg, mesh):
        found = _trace(cfg, store, steps, mesh)
    if mesh is None or not any(mesh.coordinate(axis) for axis in ("dp_replicate", "dp_shard", "cp", "tp")):
        return found
    hashes = {
        f"{kind} {name}": _hashed(array) for kind in KINDS for name, array in getattr(found, kind).items()
    }
    return replace(found, copies=hashes, initial={}, gradients={}, final={}, averages={})


def _trace(cfg: Config, store: TokenSource, steps: int, mesh: Mesh | None) -> Trace:
    state = build_state(cfg, torch.device("cpu"), mesh)
    splits = state.parallel.splits
    initial = full_arrays(state.weights.parameters, splits)
    loader = build_loader(cfg, store, mesh)
    pack_base(state.model, state.weights.parameters, cfg.lora)  # which loading the base does otherwise
    state.objective = build_objective(cfg, state.parallel, ByteTokenizer(), train=store, val=store)
    begin_objective(state, loader, _validation(cfg, store))
    accumulate_gradients(state, loader.step_batch(0), cfg)
    gradients = full_arrays(_gradients(state), splits)
    state.weights.zero_gradients()
    losses, norms, digests = [], [], []
    for step in range(steps):
        batch = loader.step_batch(step)
        stats = train_step(state, batch, cfg, lr=cfg.optim.lr)
        losses.append(stats.loss.item())
        norms.append(stats.grad_norm.item())
        digests.append(batch.digest)
    return Trace(
        losses=losses,
        grad_norms=norms,
        digests=digests,
        initial=initial,
        gradients=gradients,
        final=full_arrays(state.weights.parameters, splits),
        averages={} if state.average is None else full_arrays(state.average.averages, splits),
        eval_loss=validation_loss(state, cfg, store),
        copies={},
    )


def validation_loss(state: TrainState, cfg: Config, store: TokenSource) -> float:
    """Return the loss of five rows: an odd number, so that data-parallel ranks run out of them at different times."""
    return evaluate(state.parallel, _validation(cfg, store), None, objective=state.objective).loss


def _validation(cfg: Config, store: TokenSource) -> list[Batch]:
    batches = validation_batches(
        packed(cfg, store),
        seq_len=cfg.seq_len,
        tokens=5 * cfg.seq_len,
        micro_batch_size=1,
        mask_documents=cfg.data.mask_documents,
    )
    return list(batches)


def _gradients(state: TrainState) -> dict[str, Tensor]:
    return {name: p.grad for name, p in state.weights.parameters.items() if p.grad is not None}


def full_arrays(tensors: Mapping[str, Tensor], splits: Mapping[str, Split]) -> Arrays:
    """Return `tensors` in full (float64); all ranks that hold a shard of one must call this."""
    full = {name: full_tensor(t, splits.get(name)) for name, t in tensors.items()}
    return {name: t.to(torch.float64).numpy().copy() for name, t in full.items()}


def _hashed(array: np.ndarray) -> str:
    return hashlib.sha256((array + 0.0).tobytes()).hexdigest()  # -0.0 is 0.0


def merged(parts: list[Trace]) -> Trace:
    """Merge the ranks' traces into one.

    Raises:
        DisagreementError: ranks that must agree do not, or copies of a parameter differ.
    """
    first = parts[0]
    arrays: dict[str, Arrays] = {}
    for kind in KINDS:
        found: Arrays = {}
        for part in parts:
            for name, array in getattr(part, kind).items():
                if not np.array_equal(found.setdefault(name, array), array):
                    raise DisagreementError(f"the copies of {name} differ in their {kind} values")
        arrays[kind] = found
    hashes = {f"{kind} {name}": _hashed(array) for kind in KINDS for name, array in arrays[kind].items()}
    for part in parts:
        for key, value in part.copies.items():
            if hashes.get(key) != value:
                kind, _, name = key.partition(" ")
                raise DisagreementError(f"the copies of {name} differ in their {kind} values")
        if _reported(part) != _reported(first):
            raise DisagreementError("ranks report different losses, norms or samples")
    return replace(
        first,
        initial=arrays["initial"],
        gradients=arrays["gradients"],
        final=arrays["final"],
        averages=arrays["averages"],
    )


def _reported(part: Trace) -> tuple[object, ...]:
    return part.losses, part.grad_norms, part.digests, part.eval_loss


def relative_errors(found: Arrays, truth: Arrays) -> dict[str, float]:
    """Return the largest difference of each parameter, relative to the largest magnitude of its true values.

    That magnitude is taken as a tenth of the full model's largest at least: a gradient may be zero but for rounding
    (a key's bias shifts all scores of a query alike), and then says nothing. A parameter that is not in `found`, or has
    values that are not numbers, is infinitely wrong.
    """
    largest = {name: float(np.abs(values).max(initial=0.0)) for name, values in truth.items()}
    least = max(largest.values(), default=0.0) / 10
    return {
        name: _error(found.get(name), values) / max(largest[name], least, math.ulp(0.0))
        for name, values in truth.items()
    }


def _error(found: np.ndarray | None, truth: np.ndarray) -> float:
    if found is None or found.shape != truth.shape:
        return math.inf
    error = float(np.abs(found - truth).max(initial=0.0))
    return error if math.isfinite(error) else math.inf


def error_norm(found: Arrays, truth: Arrays) -> float:
    """Return the 2-norm of all differences, relative to the 2-norm of all true values."""
    error = math.fsum(float(np.square(found[name] - values).sum()) for name, values in truth.items())
    size = math.fsum(float(np.square(values).sum()) for values in truth.values())
    return math.sqrt(error / max(size, math.ulp(0.0)))


def largest_relative_error(found: Sequence[float], truth: Sequence[float]) -> float:
    """Return the largest relative error of numbers; infinite if one is not a number."""
    errors = [abs(x - y) / max(abs(y), math.ulp(0.0)) for x, y in zip(found, truth, strict=True)]
    return max((each if math.isfinite(each) else math.inf for each in errors), default=0.0)
