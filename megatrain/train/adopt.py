"""The checkpoint that `checkpoint.adopt` names, and how adapters remember it."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.checkpoint.errors import CorruptCheckpointError, UnknownFormatError
from megatrain.checkpoint.retention import STEP_NAME
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.nn.contract import Plan
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.shards import tell_place
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config

WEIGHTS = "model."
"""Prefix of the names of parameters and buffers in checkpoints."""


def adopted(cfg: Config, checkpointer: Checkpointer | None = None) -> tuple[Checkpointer, int | None]:
    """Return the checkpoints that checkpoint.adopt names, to be read only, and the step if it names one.

    Raises:
        UserError: there are none.
    """
    path = Path(str(cfg.checkpoint.adopt))
    step = int(path.name.removeprefix("step-")) if STEP_NAME.fullmatch(path.name) else None
    directory = path / "checkpoints" if step is None else path.parent
    processes = None if checkpointer is None else checkpointer.processes
    found = Checkpointer(directory, cfg.checkpoint, processes, moves_damaged=False)
    steps = found.steps()
    if not steps or (step is not None and step not in steps):
        raise UserError(
            f"checkpoint.adopt={path}: there is no checkpoint. It must be a run directory with checkpoints, or one of "
            "its checkpoints/step-..."
        )
    return found, step


def require_readable(found: Checkpointer, step: int | None) -> None:
    """Refuse a checkpoint that can't be read although it is whole, such as one that is encrypted with another key.

    Raises:
        UserError: it is so.
    """
    with suppress(
        CorruptCheckpointError, UnknownFormatError, OSError
    ):  # loading says so, or takes an older one
        found.open(found.steps()[-1] if step is None else step).tensor_specs()


def names_of(tensors: Mapping[str, Tensor], plan: Plan, processes: Processes) -> tuple[str, ...]:
    """Return what `Checkpointer.load` is to take as `only`, so that a classifier finds the weights of its source.

    The source may be a language model, whose head stays behind.
    """
    if not plan.has_classifier:
        return (WEIGHTS,)
    return tuple(sorted({name for names in processes.gather(list(tensors)) for name in names}))


def tensors_of(parallel: ParallelModel) -> dict[str, Tensor]:
    """Return the weights and buffers of a model by their keys in a checkpoint, into which one can be loaded."""
    splits = parallel.splits
    found = {
        f"{WEIGHTS}{name}": tell_place(p.detach(), splits[name]) if name in splits else p.detach()
        for name, p in parallel.parameters().items()
    }
    return found | {f"{WEIGHTS}{name}": b for model in parallel.models for name, b in model.named_buffers()}


def describe_base(found: VerifiedCheckpoint) -> dict[str, Any]:
    """Return what a checkpoint of adapters says of their base: its run, its step, and a digest of its files' hashes."""
    hashes = sorted((name, record.sha256) for name, record in found.manifest.files.items())
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return {"run_id": found.manifest.info.get("run_id"), "step": found.step, "digest": digest}


def require_same_base(info: dict[str, Any], base: VerifiedCheckpoint | None, checkpoint: Path) -> None:
    """Refuse what was trained beside other weights than `base`, from its manifest's `info`.

    Raises:
        UserError: they were.
    """
    known = info.get("base") or {}
    if base is not None and known != describe_base(base):
        step, run_id = known.get("step", "?"), known.get("run_id", "?")
        raise UserError(
            f"{checkpoint} was trained beside other weights than those of {base.path}: beside step {step} of the run "
            f"{run_id}. Restore that checkpoint as the newest one, or start another run with run.name=..."
        )
