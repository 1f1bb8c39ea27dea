"""A look into one checkpoint, which is read and never changed: its tensors, its hashes, what it says of its run."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.checkpoint.contents import check_tags, read_contents
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import WORKERS, FileRecord, hash_file
from megatrain.checkpoint.keys import is_given
from megatrain.checkpoint.manifest import (
    METADATA_FILE,
    STATE_FILE,
    Manifest,
    file_size,
    read_manifest,
)
from megatrain.checkpoint.reader import CheckedReader
from megatrain.config.errors import DamagedCheckpointError, UserError

KINDS = {"model.": "weights", "optim.": "optimizer", "ema.": "average"}
"""Prefix of a tensor's name -> what it is."""
TICK_S = 0.2
"""Seconds between two reports of progress."""
DELETED = "it was deleted meanwhile, as a run that trains does with its older checkpoints"
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose manifest, sizes, state and table of tensors were checked; its tensors were not."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    reader: CheckedReader

    @property
    def files(self) -> int:
        """Number of tensor files."""
        return len(self.manifest.files.keys() - {METADATA_FILE, STATE_FILE})

    @property
    def bytes(self) -> int:
        """Size of all listed files."""
        return sum(record.size for record in self.manifest.files.values())


@dataclass(frozen=True, slots=True)
class Damage:
    """One file of a checkpoint that is not what the manifest lists."""

    file: str
    what: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Result of reading every byte of a checkpoint."""

    path: Path | str
    """A text if it is a URL."""
    damages: tuple[Damage, ...]
    bytes: int
    unknown: str = ""
    """Why this version or this user can't tell; empty if it can."""

    @property
    def state(self) -> str:
        """`damaged`, `unknown` or `whole`."""
        return "damaged" if self.damages else "unknown" if self.unknown else "whole"


def kind_of(name: str) -> str:
    """Return what the tensor of that name is: weights, optimizer, average, or other."""
    return next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), "other")


def open_checkpoint(path: Path) -> Opened:
    """Read and check everything of a checkpoint but its tensors.

    Raises:
        DamagedCheckpointError: it is damaged; the message names file and checkpoint.
        UserError: this version or this user can't read it.
    """
    with naming(path):
        manifest = read_manifest(path)
        state, reader = read_contents(path, manifest)
    return Opened(path, manifest, state, reader)


def verify(path: Path, *, progress: Progress) -> Verified:
    """Read every byte of a checkpoint and compare it with the manifest. Nothing is moved or changed."""
    found = _verify(path, progress)
    if found.damages and not os.path.lexists(path):
        return Verified(path, (), 0, unknown=DELETED)
    return found


def _verify(path: Path, progress: Progress) -> Verified:
    try:
        manifest = read_manifest(path)
    except CorruptCheckpointError as error:
        return Verified(path, (_damage(error),), 0)
    except (UserError, OSError) as error:
        return Verified(path, (), 0, unknown=str(error))
    try:
        damages = _damaged_files(path, manifest, progress)
        if not damages and (manifest.encryption is None or is_given(manifest.encryption["key_id"])):
            check_tags(path, manifest)
            open_checkpoint(path)
    except CorruptCheckpointError as error:  # a tag is wrong where the hash is right
        name, _, what = str(error).partition(" ")
        return Verified(path, (Damage(name, what),), 0)
    except DamagedCheckpointError as error:
        return Verified(path, (Damage(STATE_FILE, str(error)),), 0)
    except (UserError, OSError) as error:
        return Verified(path, (), 0, unknown=str(error))
    return Verified(path, damages, sum(record.size for record in manifest.files.values()))


def require_whole(path: Path, *, progress: Progress) -> None:
    """Check every hash of a checkpoint whose tensors are about to be used.

    Raises:
        DamagedCheckpointError: one is wrong; the message names file and checkpoint.
        UserError: this version or this user can't read it.
    """
    found = verify(path, progress=progress)
    if found.damages:
        listing = "; ".join(f"{damage.file} {damage.what}" for damage in found.damages)
        raise DamagedCheckpointError(f"{path} is damaged: {listing}. It was left as it is.")
    if found.unknown:
        raise UserError(found.unknown if str(path) in found.unknown else f"{path}: {found.unknown}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of reading the checkpoint at `path` into those of a user, which name it.

    Raises:
        DamagedCheckpointError: it is damaged.
        UserError: it can't be read.
    """
    try:
        yield
    except CorruptCheckpointError as error:
        if not os.path.lexists(path):
            raise UserError(f"{path}: {DELETED}") from None
        raise DamagedCheckpointError(f"{path} is damaged: {error}. It was left as it is.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from None


def _damaged_files(path: Path, manifest: Manifest, progress: Progress) -> tuple[Damage, ...]:
    """Return every listed file that differs from its record, `WORKERS` read in parallel."""
    total = sum(record.size for record in manifest.files.values()) or 1
    sizes: list[int] = []  # of the pieces that were hashed; appending is atomic
    check = partial(_wrong_with, seen=sizes.append)
    done, counted = 0, 0
    with ThreadPoolExecutor(WORKERS) as pool:
        work = {pool.submit(check, path / name, record): name for name, record in manifest.files.items()}
        pending = set(work)
        while pending:
            _, pending = wait(pending, timeout=TICK_S)
            counted, done = len(sizes), done + sum(sizes[counted:])
            progress(f"hashing {path.name}", min(done / total, 1.0))
    return tuple(Damage(name, what) for each, name in work.items() if (what := each.result()) is not None)


def _wrong_with(path: Path, record: FileRecord, *, seen: Callable[[int], None]) -> str | None:
    """Return how a file differs from its record, or None."""
    try:
        size = file_size(path)
    except CorruptCheckpointError as error:
        return str(error).removeprefix(f"{path.name} ")
    if size != record.size:
        return f"has {size:,} bytes instead of {record.size:,}"
    return None if hash_file(path, seen=seen) == record.sha256 else "was changed: its hash is wrong"


def _damage(error: CorruptCheckpointError) -> Damage:
    """Return the damage that reading a manifest found; a damaged checkpoint without a file to blame names itself."""
    file, _, what = str(error).partition(" ")
    return Damage(file, what) if file == "manifest.json" else Damage("the directory", str(error))
