"""Rounds of a federation: a new server, and the step of the outer optimizer that makes the next round.

Federated averaging: McMahan et al., arXiv 1602.05629. DiLoCo, an outer Nesterov step on the mean change of the workers'
weights: Douillard et al., arXiv 2311.08105.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.inspect import Progress
from megatrain.checkpoint.reader import CheckedReader, TensorSpec, read_tensors
from megatrain.checkpoint.rows import lazy_tensor, read_box
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.checkpoint.upkeep import idle_run
from megatrain.config.errors import UserError
from megatrain.config.load import dump
from megatrain.observe.rundir import RunLog
from megatrain.train.adopt import describe_base
from megatrain.train.config import Config
from megatrain.train.federation import ROUND, WORKERS, is_round, newest_of
from megatrain.train.files import TOKENIZER, new_run_id, read_config, tokenizer_digest, write_config
from megatrain.train.restore import WEIGHTS
from megatrain.train.resume import changed_keys

OUTER = "outer."
"""Prefix of the names of the outer optimizer's momentum in a server's checkpoints."""
LOCAL = ("data.", "train.seed", "global_batch_size", "train.steps")
"""Beginnings of keys that may differ between workers, beside those that change no result."""


@dataclass(frozen=True, slots=True)
class Outer:
    """The outer step: theta <- theta - lr (d + momentum m), m <- momentum m + d, d = theta - mean of the workers."""

    lr: float = 0.7
    momentum: float = 0.9
    weighting: str = "equal"
    """equal: each worker counts alike; tokens: by the tokens that it has trained on since the round before."""


AVERAGE = Outer(1.0, 0.0, "tokens")
"""Federated averaging: the next weights are the mean of the workers'."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's checkpoint that enters a round."""

    run: Path
    cfg: Config
    found: VerifiedCheckpoint
    reader: CheckedReader
    tokens: int
    """Trained on since the round before."""


def start(base: Path, server: Path, *, progress: Progress) -> VerifiedCheckpoint:
    """Make the new run directory `server` with the weights of `base` as its round 0; it appears at once.

    Raises:
        UserError: `server` exists, or `base` has no checkpoint, or one of adapters.
        DamagedCheckpointError: all of them are damaged.
    """
    if server.exists():
        raise UserError(f"{server} exists already. Remove it, or choose another directory.")
    cfg = read_config(base)
    if cfg.lora.rank:
        raise UserError(f"{base} trains adapters (lora.rank), of which a federation can't be made")
    found = newest_of(base, cfg)
    reader = Checkpointer(base / "checkpoints", cfg.checkpoint, moves_damaged=False).open(found.step)
    run = replace(cfg.run, id=new_run_id(), name=server.name, dir=str(server.parent))
    cfg = replace(cfg, run=run, checkpoint=replace(cfg.checkpoint, adopt=None, durable=None))
    partial = server.absolute().parent / f".{server.name}-{uuid.uuid4().hex[:12]}"
    specs = _weights(reader)
    tensors = {name: lazy_tensor(spec, _rows(reader, name, spec)) for name, spec in specs.items()}
    try:
        partial.mkdir(parents=True)
        shutil.copytree(base / TOKENIZER, partial / TOKENIZER)
        write_config(partial, cfg)
        progress("copying the weights", 0.0)
        _save(partial, cfg, 0, tensors, {}, {"start": describe_base(found)})
        RunLog(partial, cfg.run.id).event("federate", step=0, workers={}, outer={})
        os.rename(partial, server)
    except (OSError, CheckpointSaveError) as error:
        raise UserError(f"{server} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return newest_of(server, cfg)


def next_round(
    server: Path, runs: Sequence[Path], outer: Outer, *, progress: Progress
) -> tuple[int, list[Worker]]:
    """Make the next round of `server` of the newest checkpoints of the workers `runs`; return its number.

    Raises:
        UserError: a worker is training, did not start from the newest round, or has another config or tokenizer; the
            message names it.
        DamagedCheckpointError: a checkpoint is damaged.
    """
    cfg = read_config(server)
    for n, run in enumerate(runs):
        if run.resolve() in [other.resolve() for other in runs[:n]]:
            raise UserError(f"{run} is given twice")
    with contextlib.ExitStack() as stack:
        for run in (server, *runs):
            stack.enter_context(idle_run(run))
        before = newest_of(server, cfg)
        if not is_round(before.manifest):
            raise UserError(
                f"{server} is no server of a federation. Make one: megatrain federate start BASE SERVER"
            )
        workers = [_worker(run, server, before) for run in runs]
        _check_alike(workers)
        weights = _shares(workers, outer)
        reader = Checkpointer(server / "checkpoints", cfg.checkpoint, moves_damaged=False).open(before.step)
        tensors = _next_tensors(reader, workers, weights, outer, progress)
        facts = {
            worker.cfg.run.id: {
                "run": str(worker.run),
                "step": worker.found.step,
                "tokens": worker.found.state["tokens"],
                "weight": weight,
            }
            for worker, weight in zip(workers, weights, strict=True)
        }
        kept = before.manifest.info[WORKERS] | facts
        told = {"lr": outer.lr, "momentum": outer.momentum, "weighting": outer.weighting}
        step = before.step + 1
        try:
            _save(server, cfg, step, tensors, kept, {"outer": told})
        except CheckpointSaveError as error:
            raise UserError(str(error)) from None
        RunLog(server, cfg.run.id).event("federate", step=step, workers=facts, outer=told)
    return step, workers


def _worker(run: Path, server: Path, before: VerifiedCheckpoint) -> Worker:
    """Open the newest checkpoint of a worker, which must have started from the round `before`."""
    cfg = read_config(run)
    found = newest_of(run, cfg)
    began, wanted = found.manifest.info.get(ROUND), describe_base(before)
    if not began:
        raise UserError(f"{run} did not start from {server}: start it with checkpoint.adopt={server}")
    if began != wanted:
        whose = f"round {began['step']} of it" if began["run_id"] == wanted["run_id"] else "another server"
        raise UserError(
            f"{run} did not start from the newest round of {server} ({before.step}), but from {whose}. Resume it, so "
            "that it takes up the newest round if its checkpoint has entered it, or start it anew from there"
        )
    if found.manifest.info.get("tokenizer_sha256") != tokenizer_digest(server):
        raise UserError(f"{run} has another tokenizer than {server}")
    last = before.manifest.info[WORKERS].get(cfg.run.id, {}).get("tokens", 0)
    tokens = found.state["tokens"] - last
    if tokens <= 0:
        raise UserError(f"{run} has trained on nothing since round {before.step}")
    checkpoints = Checkpointer(run / "checkpoints", cfg.checkpoint, moves_damaged=False)
    return Worker(run, cfg, found, checkpoints.open(found.step), tokens)


def _check_alike(workers: Sequence[Worker]) -> None:
    """Check that the workers are different runs with one config but for their data.

    Raises:
        UserError: two are not.
    """
    if not workers:
        raise UserError("A round needs at least one worker")
    first = workers[0]
    for n, worker in enumerate(workers):
        if any(worker.cfg.run.id == other.cfg.run.id for other in workers[:n]):
            raise UserError(f"{worker.run} is given twice")
        changed = [key for key in changed_keys(first.cfg, worker.cfg) if not key.startswith(LOCAL)]
        if changed:
            raise UserError(
                f"{worker.run} has another config than {first.run}: {', '.join(sorted(changed))}. They may differ "
                "in data, seed, batch, steps and layout alone."
            )
        if (theirs := _weights(worker.reader)) != (ours := _weights(first.reader)):
            names = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise UserError(f"{worker.run} has other tensors than {first.run}: {', '.join(names[:3])}")


def _shares(workers: Sequence[Worker], outer: Outer) -> list[float]:
    """Return the weight of each worker in the mean."""
    counts = [worker.tokens if outer.weighting == "tokens" else 1 for worker in workers]
    return [count / sum(counts) for count in counts]


def _next_tensors(
    reader: CheckedReader,
    workers: Sequence[Worker],
    weights: Sequence[float],
    outer: Outer,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return the tensors of the next round, which are computed in float64 as they are written, by rows."""
    specs, stored = _weights(reader), reader.tensor_specs()
    tensors: dict[str, Tensor] = {}
    for done, (name, spec) in enumerate(specs.items()):
        progress("averaging", done / len(specs))
        sources = [_rows(worker.reader, name, spec) for worker in workers]
        ours, momentum = _rows(reader, name, spec), OUTER + name.removeprefix(WEIGHTS)
        state = _rows(reader, momentum, spec) if momentum in stored else None
        tensors[name] = lazy_tensor(spec, _stepped(ours, sources, weights, outer, state))
        if outer.momentum and spec.dtype.is_floating_point:
            tensors[momentum] = lazy_tensor(spec, _moved(ours, sources, weights, outer, state))
    return tensors


Rows = Callable[[int, int], Tensor]


def _change(ours: Rows, sources: Sequence[Rows], weights: Sequence[float]) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        mean = sum(
            weight * source(start, stop).double() for weight, source in zip(weights, sources, strict=True)
        )
        return ours(start, stop).double() - mean

    return rows


def _moved(
    ours: Rows, sources: Sequence[Rows], weights: Sequence[float], outer: Outer, state: Rows | None
) -> Rows:
    """Return the rows of the new momentum (float64)."""
    change = _change(ours, sources, weights)

    def rows(start: int, stop: int) -> Tensor:
        old = 0.0 if state is None else state(start, stop).double()
        return outer.momentum * old + change(start, stop)

    return rows


def _stepped(
    ours: Rows, sources: Sequence[Rows], weights: Sequence[float], outer: Outer, state: Rows | None
) -> Rows:
    """Return the rows of the new weights (float64); what are no floating-point numbers stays."""
    change, moved = _change(ours, sources, weights), _moved(ours, sources, weights, outer, state)

    def rows(start: int, stop: int) -> Tensor:
        theta = ours(start, stop)
        if not theta.dtype.is_floating_point:
            return theta
        step = change(start, stop)
        if outer.momentum:
            step = step + outer.momentum * moved(start, stop)
        return theta.double() - outer.lr * step

    return rows


def _weights(reader: CheckedReader) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in reader.tensor_specs().items() if name.startswith(WEIGHTS)}


def _rows(reader: CheckedReader, name: str, spec: TensorSpec) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        if not spec.size:
            whole = torch.empty((), dtype=spec.dtype)
            read_tensors(reader, {name: whole})
            return whole
        rest = spec.size[1:]
        return read_box(reader, name, spec, (start, *(0 for _ in rest)), (stop - start, *rest))

    return rows


def _save(
    server: Path,
    cfg: Config,
    step: int,
    tensors: dict[str, Tensor],
    workers: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Commit a round."""
    info = {"run_id": cfg.run.id, "config": dump(cfg), "tokenizer_sha256": tokenizer_digest(server)}
    state = {"step": step, "tokens": 0, "watch": {}}
    keeps_all = replace(cfg.checkpoint, keep=0)
    Checkpointer(server / "checkpoints", keeps_all).save(
        step, tensors, state, info | {WORKERS: workers} | facts
    )
