"""Durable tier: checkpoints and records of one run behind a URL, in a place that outlives the machine.

<checkpoint.durable>/<run.name>/
  owner.json                        process that uploads, and the run's id
  config.yaml, tokenizer/, ...      copies of the run's records
  checkpoints/step-00000100/        manifest.json, put last
    1f6d0c9a8b7e5d43/               files of the checkpoint with that manifest, named by the manifest's hash

An object store has no rename, so a checkpoint counts once its manifest is there. Another attempt at a step has other
files in a directory of its own, and becomes the checkpoint as its manifest replaces the one before. So nothing that
counts is ever written over, also by a request of a killed process that arrives late.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.files import (
    READ_BYTES,
    WORKERS,
    FileRecord,
    make_directory,
    sync_directory,
    write_file,
    write_stream,
)
from megatrain.checkpoint.listing import CHECKPOINTS
from megatrain.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_sizes,
    parse_manifest,
    read_bounded,
    read_manifest,
)
from megatrain.checkpoint.retention import EVAL_LOSS, STEP_NAME, TEMPORARY, retained, step_name, unique_name
from megatrain.config.errors import UserError
from megatrain.runtime.ownership import OWNER_FILE, Owner, StaleOwnerError
from megatrain.runtime.urls import open_file_system, reachable

PART = ".part"
"""End of the name of a small file that is being written, where the store has no other way to replace one at once."""
MAX_RECORD_BYTES = 1 << 30
Seen = Callable[[int], None]
"""Function that is told the bytes of each piece that was sent, fetched or hashed."""


def unseen(size: int) -> None:
    """Take no notice of a piece."""


def content_name(manifest: Manifest, file: str) -> str:
    """Return the path of a file of a checkpoint, below the directory of its step."""
    return f"{hashlib.sha256(manifest.render()).hexdigest()[:16]}/{file}"


def misplaced(manifest: Manifest, present: Mapping[str, int]) -> str:
    """Return what is wrong with the files `present` in the directory of a step: the first that is; empty: nothing.

    Args:
        present: path below that directory -> bytes.
    """
    for name, record in manifest.files.items():
        size = present.get(content_name(manifest, name))
        if size != record.size:
            return f"{name} " + (
                "is missing" if size is None else f"has {size:,} bytes instead of {record.size:,}"
            )
    return ""


class Tier:
    """The directory of one run behind `url`. Every method but `put` and `upload` may be called from any process."""

    def __init__(self, url: str) -> None:
        """Open the directory at `url`, or at a path of this machine; nothing is read or written yet.

        Raises:
            UserError: a package is missing, or the protocol is unknown.
        """
        self.url = url.rstrip("/")
        self._fs, root = open_file_system(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")
        protocol = self._fs.protocol
        self._is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def address(self, step: int) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.url}/{CHECKPOINTS}/{step_name(step)}"

    # --- what is there ---

    def stored(self) -> dict[int, dict[str, int]]:
        """Return what there is of each checkpoint, complete or not: step -> name of a file -> bytes.

        Raises:
            UserError: the tier can't be reached.
        """
        top = self._path(CHECKPOINTS)
        with reachable(self.url):
            try:
                found = self._fs.find(top, detail=True)
            except FileNotFoundError:
                found = {}
        stored: dict[int, dict[str, int]] = {}
        for path, info in found.items():
            directory, _, name = path.removeprefix(top).lstrip("/").partition("/")
            match = STEP_NAME.fullmatch(directory)
            if match and name and step_name(int(match[1])) == directory:
                stored.setdefault(int(match[1]), {})[name] = int(info["size"] or 0)
        return stored

    def steps(self) -> list[int]:
        """Return the steps whose manifest is there, in ascending order.

        Raises:
            UserError: the tier can't be reached.
        """
        return sorted(step for step, files in self.stored().items() if MANIFEST_FILE in files)

    def manifest(self, step: int) -> Manifest:
        """Return the checked manifest of a checkpoint.

        Raises:
            CorruptCheckpointError: it is missing or was changed.
            UserError: the tier can't be reached, or a later version of megatrain wrote it.
        """
        raw = self.read(self._name(step, MANIFEST_FILE))
        if raw is None:
            raise CorruptCheckpointError(f"{MANIFEST_FILE} is missing")
        manifest = parse_manifest(raw, place=self.address(step))
        if manifest.step != step:
            raise CorruptCheckpointError(f"{MANIFEST_FILE} belongs to step {manifest.step}")
        return manifest

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a small file of the run; None if it is not there.

        Raises:
            CorruptCheckpointError: it is larger than any that was written here.
            UserError: the tier can't be reached.
        """
        with reachable(self.url):
            try:
                size = int(self._fs.size(self._path(name)) or 0)
                if size <= MAX_RECORD_BYTES:
                    return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None
        raise CorruptCheckpointError(f"{name} has {size:,} bytes")

    def names(self, directory: str) -> list[str]:
        """Return the names of the files in a directory of the run."""
        with reachable(self.url):
            try:
                found = self._fs.find(self._path(directory), maxdepth=1)
            except FileNotFoundError:
                return []
        names = (path.rpartition("/")[2] for path in found)
        return sorted(name for name in names if not name.endswith(PART))

    def hash_file(self, manifest: Manifest, name: str, *, seen: Seen = unseen) -> FileRecord | None:
        """Read a file of a checkpoint; return its size and hash, None if it is missing."""
        digest, size = hashlib.sha256(), 0
        try:
            with self._fs.open(self._content(manifest, name), "rb") as file:
                for piece in iter(partial(file.read, READ_BYTES), b""):
                    digest.update(piece)
                    size += len(piece)
                    seen(len(piece))
        except FileNotFoundError:
            return None
        return FileRecord(size, digest.hexdigest())

    # --- whose it is ---

    def owner(self) -> tuple[Owner, str] | None:
        """Return the process that took the tier last, and the id of its run; None if it was never taken."""
        with suppress(CorruptCheckpointError, ValueError, TypeError, KeyError):
            if (raw := self.read(OWNER_FILE)) is not None:
                fields = json.loads(raw)
                run_id = str(fields.pop("run_id"))
                return Owner(**fields), run_id
        return None

    def run_id(self) -> str:
        """Return the id of the run whose checkpoints are here; empty if there is none.

        Raises:
            UserError: the tier can't be reached.
        """
        if (found := self.owner()) is not None:
            return found[1]
        for step in reversed(self.steps()):
            with suppress(CorruptCheckpointError):
                return str(self.manifest(step).info.get("run_id", ""))
        return ""

    def take(self, owner: Owner, run_id: str) -> None:
        """Become the process that uploads here; the one before finds out by its next write.

        Raises:
            UserError: the tier can't be written.
        """
        with reachable(self.url):
            self.put(OWNER_FILE, json.dumps(asdict(owner) | {"run_id": run_id}, indent=1).encode() + b"\n")

    def require(self, owner: Owner) -> None:
        """Check that nobody has taken the tier since `owner` did.

        Raises:
            StaleOwnerError: somebody has; the message says who.
        """
        found = self.owner()
        if found is not None and found[0].nonce != owner.nonce:
            raise StaleOwnerError(
                f"{self.url} belongs to {found[0]} now (this process has had it since {owner.since}): the run goes on "
                "there. Nothing more is uploaded by this one."
            )

    # --- writing ---

    def put(self, name: str, data: bytes) -> None:
        """Store a small file of the run, of which no part is ever seen without the rest."""
        path = self._path(name)
        if not self._is_local:  # an object appears as a whole
            self._fs.pipe_file(path, data)
            return
        target = Path(path)
        make_directory(target.parent)
        part = target.with_name(f".{target.name}{PART}")
        part.unlink(missing_ok=True)
        write_file(part, data)
        os.replace(part, target)
        sync_directory(target.parent)

    def upload(self, source: Path, *, require_owner: Callable[[], None], seen: Seen = unseen) -> int:
        """Store the checkpoint at `source`, or what an upload that was cut off has left to do; return the bytes sent.

        Files that are here with the size and the hash of the manifest are kept. The others are hashed as they are sent.
        The manifest follows once all sizes are right. What is left of other attempts at the step is deleted then.

        Raises:
            CorruptCheckpointError: the checkpoint at `source` is damaged, or deleted.
            StaleOwnerError: `require_owner` says so; the checkpoint is not committed.
            OSError: the store lost a file; or its own error.
        """
        manifest, raw = read_manifest(source), read_bounded(source / MANIFEST_FILE)
        check_sizes(source, manifest)
        step = manifest.step
        present = self.stored().get(step, {})
        is_committed = MANIFEST_FILE in present and self.read(self._name(step, MANIFEST_FILE)) == raw
        require_owner()
        if is_committed and not misplaced(manifest, present):
            self._remove_others(manifest, present)
            return 0
        if is_committed:  # and files are gone
            self._fs.rm(self._path(self._name(step, MANIFEST_FILE)))

        def send(name: str) -> int:
            record = manifest.files[name]
            has_size = present.get(content_name(manifest, name)) == record.size
            if has_size and self.hash_file(manifest, name) == record:
                seen(record.size)
                return 0
            require_owner()
            self._send(source / name, self._content(manifest, name), record, seen)
            return record.size

        with ThreadPoolExecutor(WORKERS) as pool:
            sent = sum(pool.map(send, sorted(manifest.files, key=lambda name: -manifest.files[name].size)))
        present = self.stored().get(step, {})
        if misplaced(manifest, present):
            raise OSError(f"{self.address(step)} does not have the files that were sent there")
        require_owner()
        self.put(self._name(step, MANIFEST_FILE), raw)
        self._remove_others(manifest, present)
        return sent + len(raw)

    def prune(
        self, cfg: CheckpointConfig, *, require_owner: Callable[[], None], spare: Collection[int] = ()
    ) -> None:
        """Delete the checkpoints that `cfg` does not keep, and what is left of uploads that were cut off.

        Args:
            spare: steps that are left alone, whatever there is of them.
        """
        stored = self.stored()
        steps = [step for step, files in stored.items() if MANIFEST_FILE in files]
        losses = self._losses(steps) if cfg.keep_best else {}
        for step in sorted(stored.keys() - retained(steps, losses, cfg) - {*spare}):
            require_owner()
            self.remove(step)

    def remove(self, step: int) -> None:
        """Delete a checkpoint, its manifest first, so that a part of it is never taken for the whole."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(self._name(step, MANIFEST_FILE)))
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(f"{CHECKPOINTS}/{step_name(step)}"), recursive=True)

    # --- reading back ---

    def fetch(self, step: int, directory: Path, *, seen: Seen = unseen) -> Path:
        """Copy a checkpoint into `directory` of this machine, every hash checked; return its path, made by one rename.

        Raises:
            CorruptCheckpointError: a file here is missing or was changed; the message names it.
            UserError: the tier can't be reached, or the disk is full, for instance.
        """
        manifest = self.manifest(step)
        staging = directory / unique_name(TEMPORARY, step)
        try:
            make_directory(directory)
            staging.mkdir()
            with ThreadPoolExecutor(WORKERS) as pool:
                for part in [
                    pool.submit(self._get, manifest, name, staging, seen) for name in manifest.files
                ]:
                    part.result()
            write_file(staging / MANIFEST_FILE, manifest.render())
            sync_directory(staging)
            os.rename(staging, directory / step_name(step))
            sync_directory(directory)
        except (CorruptCheckpointError, UserError):
            raise
        except Exception as error:  # every backend has errors of its own
            raise UserError(f"{self.address(step)} can't be fetched into {directory}: {error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return directory / step_name(step)

    # --- helpers ---

    def _remove_others(self, manifest: Manifest, present: Collection[str]) -> None:
        """Delete what is in the directory of a step and not of the checkpoint with that manifest."""
        own = content_name(manifest, "").rstrip("/")
        for other in {name.partition("/")[0] for name in present} - {own, MANIFEST_FILE}:
            with suppress(FileNotFoundError):  # a part that became the manifest
                self._fs.rm(self._path(self._name(manifest.step, other)), recursive=True)

    def _content(self, manifest: Manifest, file: str) -> str:
        return self._path(self._name(manifest.step, content_name(manifest, file)))

    def _name(self, step: int, file: str) -> str:
        return f"{CHECKPOINTS}/{step_name(step)}/{file}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _send(self, source: Path, path: str, record: FileRecord, seen: Seen) -> None:
        """Store one file of a checkpoint, hashed as it is sent."""
        with source.open("rb", buffering=0) as file:
            if self._is_local:
                target = Path(path)
                make_directory(target.parent)
                target.unlink(missing_ok=True)
                found = write_stream(file, target, seen=seen)
            else:
                digest, size = hashlib.sha256(), 0
                with self._fs.open(path, "wb") as out:
                    for piece in iter(partial(file.read, READ_BYTES), b""):
                        digest.update(piece)
                        size += out.write(piece)
                        seen(len(piece))
                found = FileRecord(size, digest.hexdigest())
        if found != record:
            raise CorruptCheckpointError(f"{source.name} was changed: its hash is wrong")

    def _get(self, manifest: Manifest, name: str, directory: Path, seen: Seen) -> None:
        """Copy one file of a checkpoint into `directory`, and check it."""
        try:
            with self._fs.open(self._content(manifest, name), "rb") as file:
                found = write_stream(file, directory / name, seen=seen)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{name} is missing") from None
        if found != manifest.files[name]:
            raise CorruptCheckpointError(f"{name} was changed: its size or its hash is wrong")

    def _losses(self, steps: Collection[int]) -> dict[int, float]:
        found: dict[int, float] = {}
        for step in steps:
            with suppress(CorruptCheckpointError, UserError):
                loss: Any = self.manifest(step).info.get(EVAL_LOSS)
                if isinstance(loss, int | float):
                    found[step] = loss
        return found
