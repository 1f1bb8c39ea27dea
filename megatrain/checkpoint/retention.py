"""Layout of a checkpoint directory: which checkpoints exist, which are kept, and where damaged ones go.

checkpoints/
  step-00000100/                committed: its name appeared by one rename
  .tmp-step-00000200-1f3a…/     being written, or left behind by a killed process
  .trash-step-00000050-77b2…/   being deleted
  quarantine/step-00000150-…/   damaged, with reason.json
"""

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import make_directory
from megatrain.checkpoint.manifest import check_sizes, read_manifest
from megatrain.config.errors import UserError

QUARANTINE = "quarantine"
REASON_FILE = "reason.json"
EVAL_LOSS = "eval_loss"
"""Key of a manifest's `info`: validation loss of the step, where it was validated."""
MAX_WARNINGS = 8
"""Damaged checkpoints that are named one by one."""
STEP_NAME = re.compile(r"step-(\d{8,18})")
TEMPORARY = ".tmp-"
TRASH = ".trash-"


def step_name(step: int) -> str:
    """Return the directory name of a committed checkpoint."""
    return f"step-{step:08d}"


def unique_name(prefix: str, step: int) -> str:
    """Return a unique directory name for one attempt."""
    return f"{prefix}{step_name(step)}-{uuid.uuid4().hex[:12]}"


def committed_steps(directory: Path) -> list[int]:
    """Return the steps with a committed checkpoint in ascending order, from the directory names alone.

    Raises:
        UserError: the directory can't be read.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory} can't be read: {error.strerror}") from None
    found = (STEP_NAME.fullmatch(name) for name in names)
    return sorted(step for match in found if match and step_name(step := int(match[1])) == match[0])


def retained(steps: Collection[int], losses: Mapping[int, float], cfg: CheckpointConfig) -> set[int]:
    """Return those of `steps` that `cfg` keeps: the most recent, each `keep_every`-th, the best by validation loss.

    Args:
        losses: validation losses of the steps that have one. Of equal ones the earlier step is better.
    """
    if cfg.keep == 0:
        return set(steps)
    recent = sorted(steps)[-cfg.keep :]
    regular = [step for step in steps if step > 0 and cfg.keep_every > 0 and step % cfg.keep_every == 0]
    ranked = sorted((loss, step) for step, loss in losses.items() if step in steps and math.isfinite(loss))
    return {*recent, *regular, *(step for _, step in ranked[: cfg.keep_best])}


def prune(
    directory: Path, cfg: CheckpointConfig, *, adding: int | None = None, spare: Collection[int] = ()
) -> None:
    """Delete the checkpoints that `cfg` does not keep, but never the newest whole one.

    Each is renamed first, so that a partly deleted one is never mistaken for a checkpoint. Failed deletions are retried
    after the next save.

    Args:
        adding: step that is saved next, and has a place already.
        spare: steps that stay, for now.
    """
    if not cfg.keep:
        return
    steps = committed_steps(directory)
    losses = _losses(directory, steps) if cfg.keep_best else {}
    kept = retained({*steps} if adding is None else {*steps, adding}, losses, cfg)
    for step in sorted({*steps} - kept - {*spare} - _newest_whole(directory, steps)):
        try:
            os.rename(directory / step_name(step), directory / unique_name(TRASH, step))
        except OSError:
            continue
    _remove_all(directory, TRASH)


def remove_leftovers(directory: Path) -> None:
    """Delete partly written checkpoints of killed processes. Only the one process that writes here may call this."""
    _remove_all(directory, TEMPORARY)
    _remove_all(directory, TRASH)


def quarantined(directory: Path) -> list[str]:
    """Return the names of the quarantined checkpoints."""
    try:
        return sorted(os.listdir(directory / QUARANTINE))
    except FileNotFoundError:
        return []


def quarantine(directory: Path, step: int, reason: str) -> Path:
    """Move a damaged checkpoint to `quarantine/`, write `reason.json` beside it, and return its new path.

    Nothing is synced, which takes most of the time where there are many: after a power loss it is found once more.

    Raises:
        OSError: it cannot be moved, for instance on a read-only disk.
    """
    target = directory / QUARANTINE / unique_name("", step)
    make_directory(target.parent)
    os.rename(directory / step_name(step), target)
    if target.is_dir() and not target.is_symlink():
        report = json.dumps({"step": step, "reason": reason}, indent=2) + "\n"
        (target / REASON_FILE).unlink(missing_ok=True)
        (target / REASON_FILE).write_text(report)
    return target


def shortened(warnings: list[str], directory: Path) -> list[str]:
    """Return the first of `warnings` about damaged checkpoints, and the number of the others."""
    if len(warnings) <= MAX_WARNINGS:
        return warnings
    return [
        *warnings[:MAX_WARNINGS],
        f"{len(warnings) - MAX_WARNINGS} more checkpoints in {directory} are damaged.",
    ]


def _losses(directory: Path, steps: list[int]) -> dict[int, float]:
    """Return the validation losses of those of `steps` that have one and a good manifest."""
    found: dict[int, float] = {}
    for step in steps:
        try:
            loss = read_manifest(directory / step_name(step)).info.get(EVAL_LOSS)
        except (CorruptCheckpointError, UserError, OSError):
            continue
        if isinstance(loss, int | float):
            found[step] = loss
    return found


def _newest_whole(directory: Path, steps: list[int]) -> set[int]:
    """Return the newest of `steps` whose files are all there, by the manifest and the sizes; empty if there is none."""
    for step in reversed(steps):
        try:
            check_sizes(directory / step_name(step), read_manifest(directory / step_name(step)))
        except (CorruptCheckpointError, OSError):
            continue
        except UserError:  # a later version's: not for this one to judge
            pass
        return {step}
    return set()


def _remove_all(directory: Path, prefix: str) -> None:
    """Delete every entry of `directory` whose name starts with `prefix`, as far as possible."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(prefix):
            shutil.rmtree(directory / name, ignore_errors=True)
