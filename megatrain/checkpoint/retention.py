"""Layout of a checkpoint directory: which checkpoints exist, which are kept, and where damaged ones go.

checkpoints/
  step-00000100/                committed: its name appeared by one rename
  .tmp-step-00000200-1f3a…/     being written, or left behind by a killed process
  .trash-step-00000050-77b2…/   being deleted
  quarantine/step-00000150-…/   damaged, with reason.json
"""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

from megatrain.checkpoint.files import make_directory, sync_directory, write_file
from megatrain.config.errors import UserError

QUARANTINE = "quarantine"
REASON_FILE = "reason.json"
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


def prune(directory: Path, keep: int) -> None:
    """Delete all but the `keep` most recent checkpoints; 0 keeps all.

    Each is renamed first, so that a partly deleted one is never mistaken for a checkpoint. Failed deletions are retried
    after the next save.
    """
    if not keep:
        return
    for step in committed_steps(directory)[:-keep]:
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

    Raises:
        OSError: it cannot be moved, for instance on a read-only disk.
    """
    target = directory / QUARANTINE / unique_name("", step)
    make_directory(target.parent)
    os.rename(directory / step_name(step), target)
    sync_directory(directory)
    sync_directory(target.parent)
    if target.is_dir() and not target.is_symlink():
        report = json.dumps({"step": step, "reason": reason}, indent=2) + "\n"
        (target / REASON_FILE).unlink(missing_ok=True)
        write_file(target / REASON_FILE, report.encode())
    return target


def _remove_all(directory: Path, prefix: str) -> None:
    """Delete every entry of `directory` whose name starts with `prefix`, as far as possible."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(prefix):
            shutil.rmtree(directory / name, ignore_errors=True)
