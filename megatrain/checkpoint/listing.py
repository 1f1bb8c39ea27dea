"""List of what lies in a checkpoint directory, complete or not, without opening a tensor or changing anything."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.manifest import MANIFEST_FILE, check_sizes, read_bounded, read_manifest
from megatrain.checkpoint.retention import (
    QUARANTINE,
    REASON_FILE,
    STEP_NAME,
    TEMPORARY,
    TRASH,
    committed_steps,
    quarantined,
    step_name,
)
from megatrain.config.errors import UserError

CHECKPOINTS = "checkpoints"
"""Directory of a run in which its checkpoints are."""
MAX_REASON_BYTES = 1 << 20
State = Literal["complete", "damaged", "unknown", "quarantined", "unfinished", "being deleted"]


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a checkpoint directory, as its name, its manifest and the sizes of its files tell."""

    path: Path | str
    """A text if it is a URL."""
    step: int
    state: State
    """`unknown`: this version or this user can't read it, which says nothing about the checkpoint."""
    bytes: int
    created: str
    """When it was saved, or else last changed: ISO 8601, UTC."""
    parent: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    """What the run recorded: layout, config digest, data fingerprint."""
    reason: str = ""
    """Why it is damaged, unknown or quarantined."""


def run_of(path: Path) -> Path | None:
    """Return the run directory to which a checkpoint or a directory of checkpoints belongs by its place, if any."""
    for inner in (path, path.parent):
        if inner.name == CHECKPOINTS:
            return inner.parent
    return None


def checkpoint_directory(path: Path) -> Path:
    """Return the directory that holds the checkpoints of `path`, a run directory or that directory itself.

    Raises:
        UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory. Name a run directory, such as runs/default.")
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS
    if path.name == CHECKPOINTS or committed_steps(path):
        return path
    inner = sorted(found.parent.name for found in path.glob(f"*/{CHECKPOINTS}"))
    hint = f" It holds runs: {', '.join(str(path / name) for name in inner[:3])}." if inner else ""
    raise UserError(
        f"{path} has no checkpoints: there is no {path / CHECKPOINTS} and no step-... in it.{hint}"
    )


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at `path`, or all those of the run there, oldest first; their content is not looked at.

    Raises:
        UserError: there is none.
    """
    absolute = path.absolute()
    if absolute.parent.name == QUARANTINE:
        raise UserError(
            f"{path} is in quarantine: {_quarantine_reason(path) or 'no reason is recorded'}. To look into it, move it "
            f"to a directory of its own, under the name {absolute.name.rpartition('-')[0]}."
        )
    if STEP_NAME.fullmatch(absolute.name) or (path / MANIFEST_FILE).is_file():
        if not os.path.lexists(path):
            raise UserError(f"{path}: there is no such checkpoint.{_others(absolute.parent)}")
        return [path]
    directory = checkpoint_directory(path)
    steps = committed_steps(directory)
    if not steps:
        aside = f" ({len(quarantined(directory))} in quarantine)" if quarantined(directory) else ""
        raise UserError(f"{path} has no committed checkpoint{aside}.")
    return [directory / step_name(step) for step in steps]


def list_checkpoints(directory: Path) -> list[Listed]:
    """Return the checkpoints in `directory` by step, with those that are unfinished, being deleted or in quarantine.

    Raises:
        UserError: the directory can't be read.
    """
    found = [_committed(directory / step_name(step)) for step in committed_steps(directory)]
    for name in os.listdir(directory):
        if name.startswith(TEMPORARY):
            found.append(_aside(directory / name, "unfinished"))
        elif name.startswith(TRASH):
            found.append(_aside(directory / name, "being deleted"))
    found += [_aside(directory / QUARANTINE / name, "quarantined") for name in quarantined(directory)]
    return sorted((each for each in found if each is not None), key=lambda each: (each.step, str(each.path)))


def is_complete(path: Path) -> bool:
    """Return whether the checkpoint at `path` has a manifest and all its files in their sizes."""
    found = _committed(path)
    return found is not None and found.state == "complete"


def _committed(path: Path) -> Listed | None:
    """Return a checkpoint by its final name; None if it was deleted meanwhile."""
    step = int(path.name.removeprefix("step-"))
    state: State
    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
    except CorruptCheckpointError as error:
        state, reason = "damaged", str(error)
    except (UserError, OSError) as error:
        state, reason = "unknown", str(error)
    else:
        size = sum(record.size for record in manifest.files.values())
        return Listed(path, step, "complete", size, manifest.created, manifest.parent, manifest.info)
    return None if not os.path.lexists(path) else Listed(path, step, state, *_measure(path), reason=reason)


def _aside(path: Path, state: State) -> Listed | None:
    """Return an entry that is no committed checkpoint; None if it is gone, or its name says no step."""
    match = STEP_NAME.search(path.name)
    if match is None or not os.path.lexists(path):
        return None
    reason = _quarantine_reason(path) if state == "quarantined" else ""
    return Listed(path, int(match[1]), state, *_measure(path), reason=reason)


def _measure(path: Path) -> tuple[int, str]:
    """Return the bytes of the files of `path`, and when it was last changed."""
    size, changed = 0, 0.0
    with suppress(OSError):
        changed = path.lstat().st_mtime
        if path.is_dir() and not path.is_symlink():
            with os.scandir(path) as entries:
                size = sum(
                    entry.stat(follow_symlinks=False).st_size for entry in entries if not entry.is_dir()
                )
    return size, datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")


def _quarantine_reason(path: Path) -> str:
    with suppress(CorruptCheckpointError, OSError, ValueError, RecursionError):
        found = json.loads(read_bounded(path / REASON_FILE, MAX_REASON_BYTES))
        return str(found["reason"]) if isinstance(found, dict) and "reason" in found else ""
    return ""


def _others(directory: Path) -> str:
    steps = committed_steps(directory)
    return f" There are {', '.join(map(step_name, steps[-3:]))}." if steps else ""
