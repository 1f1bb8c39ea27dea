"""Saves and loads checkpoints. One appears whole by one rename, and is loaded only if every byte is as written.

checkpoints/step-00000100/
  __0_0.distcp, .metadata    tensors, as torch.distributed.checkpoint writes them (plain torch can read them)
  state.json                 everything that is not a tensor
  manifest.json              size and SHA-256 of each file, versions, what the run says of itself
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointSaveError, Damage
from megatrain.checkpoint.files import free_bytes, make_directory, sync_directory, write_file
from megatrain.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    METADATA_FILE,
    STATE_FILE,
    Manifest,
    check_hashes,
    check_sizes,
    parse_json,
    read_listed,
    read_manifest,
)
from megatrain.checkpoint.reader import (
    MAX_METADATA_BYTES,
    CheckedReader,
    Kind,
    check_same_tensors,
    read_metadata,
    read_tensors,
)
from megatrain.checkpoint.retention import (
    TEMPORARY,
    committed_steps,
    prune,
    quarantine,
    quarantined,
    step_name,
    sweep,
    unique_name,
)
from megatrain.checkpoint.writer import write_tensors
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.processes import Processes

BYTES_PER_TENSOR = 4096  # names, headers and alignment that a tensor takes beside its elements
SPARE_BYTES = 64 << 10  # for state, manifest and directories


@dataclass(frozen=True)
class Found:
    """A good checkpoint: what it says, and a warning for each newer one that was damaged."""

    step: int
    path: Path
    state: dict[str, Any]
    manifest: Manifest
    warnings: tuple[str, ...] = ()


class Checkpointer:
    """The checkpoints of one run, in `directory`.

    A step is saved once: into a temporary folder that gets its final name as the last act. 'Latest' is found by
    looking at the names, never by a pointer. All `processes` of a run save and load together, each its own parts of
    the tensors; the first one names, counts and deletes.
    """

    def __init__(self, directory: Path, cfg: CheckpointConfig, processes: Processes | None = None) -> None:
        self.directory = directory
        self.cfg = cfg
        self.processes = processes or Processes()
        self._parent: str | None = None

    def steps(self) -> list[int]:
        """Committed steps, ascending, by their names alone."""
        return committed_steps(self.directory)

    def has_damaged(self) -> bool:
        """Whether damaged checkpoints were put aside here: if there are no others, loading is refused."""
        return bool(quarantined(self.directory))

    def sweep(self) -> None:
        """Delete what killed processes left half-written. For the process that trains this run, at its start."""
        sweep(self.directory)

    def preflight(self, tensors: dict[str, Tensor]) -> None:
        """Find out now, not at the first save, whether checkpoints of `tensors` can be written.

        Raises:
            UserError: the directory can't be written, or the disk has no room for one checkpoint.
        """
        kinds = self._kinds(tensors)
        self.processes.from_first(lambda: self._try_out(kinds))

    def _try_out(self, kinds: dict[str, Kind]) -> None:
        probe = self.directory / unique_name(TEMPORARY, 0)
        try:
            make_directory(self.directory)
            probe.mkdir()
            write_file(probe / "probe", b"probe")
            _check_space(self.directory, kinds)
        except (OSError, CheckpointSaveError) as error:
            raise UserError(f"Checkpoints can't be written to {self.directory}: {error}") from None
        finally:
            shutil.rmtree(probe, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        info: dict[str, Any] | None = None,
    ) -> Path:
        """Commit a checkpoint of `step`, then delete those that are too old; the committed directory.

        `state` and `info` are JSON. A step that is already there stays as it is if it is the same, byte for byte.

        Raises:
            CheckpointSaveError: nothing was committed (no room, a disk error, another checkpoint of that step);
                what was committed before is untouched.
            ValueError: `state` does not survive JSON.
        """
        encoded = _encode(state)
        kinds = self._kinds(tensors)
        staging = self.directory / self.processes.from_first(lambda: unique_name(TEMPORARY, step))
        try:
            self.processes.from_first(lambda: self._make_room(staging, kinds))
            own = self.processes.agree(lambda: write_tensors(staging, tensors, self.processes.group))
            files = {name: record for part in self.processes.gather(own) for name, record in part.items()}
            manifest = Manifest(step=step, files=files, info=info or {}, parent=self._parent)
            path = self.processes.from_first(lambda: self._finish(staging, manifest, encoded))
        except OSError as error:
            raise CheckpointSaveError(
                f"The checkpoint of step {step} was not saved in {self.directory}: {error}. "
                "Earlier checkpoints are untouched."
            ) from error
        finally:
            if self.processes.is_first:
                shutil.rmtree(staging, ignore_errors=True)
        self._parent = path.name
        if self.processes.is_first:
            prune(self.directory, self.cfg.keep)
        return path

    def _make_room(self, staging: Path, kinds: dict[str, Kind]) -> None:
        make_directory(self.directory)
        _check_space(self.directory, kinds)
        staging.mkdir()

    def _finish(self, staging: Path, manifest: Manifest, state: bytes) -> Path:
        """Everything beside the tensors, and the rename."""
        manifest.files[STATE_FILE] = write_file(staging / STATE_FILE, state)
        write_file(staging / MANIFEST_FILE, manifest.render())
        sync_directory(staging)
        return self._commit(staging, manifest)

    def _kinds(self, tensors: dict[str, Tensor]) -> dict[str, Kind]:
        """What all processes hold together: not each has every tensor."""
        own = {name: Kind(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        return {name: kind for part in self.processes.gather(own) for name, kind in part.items()}

    def latest(self) -> Found | None:
        """The newest good checkpoint, verified but not loaded; None if there never was one.

        A damaged one is moved to `quarantine/`, with the reason, and the next older one is taken.

        Raises:
            DamagedCheckpointError: there were some, and none is good.
        """
        return self._newest_good(self._verify)

    def open(self, step: int) -> CheckedReader:
        """The tensors of a checkpoint that `latest` has found, to read some of them with `read_tensors`."""
        return self._open(step)[1]

    def load(self, tensors: dict[str, Tensor], *, only: str = "") -> Found | None:
        """Read the newest good checkpoint into `tensors`, in place; None if there never was one.

        Names, shapes and dtypes must be exactly the saved ones; with `only`, those of the saved tensors whose name
        starts with it. After an error the values in `tensors` are undefined.

        Raises:
            DamagedCheckpointError: there were some, and none is good.
            CheckpointMismatchError: the checkpoint is good, but holds other tensors.
        """
        kinds = self._kinds(tensors)
        found = self._newest_good(lambda step: self._read(step, tensors, kinds, only))
        if found is not None:
            self._parent = found.path.name
        return found

    def _commit(self, staging: Path, manifest: Manifest) -> Path:
        target = self.directory / step_name(manifest.step)
        if os.path.lexists(target) and self._is_same(manifest):
            return target
        os.rename(staging, target)  # fails if the name has come into being since
        sync_directory(self.directory)
        return target

    def _is_same(self, manifest: Manifest) -> bool:
        """Whether the step is there with the very same files. A damaged one makes room.

        Raises:
            CheckpointSaveError: it is good, but another one.
        """
        target = self.directory / step_name(manifest.step)
        try:
            old = read_manifest(target)
            check_sizes(target, old)
            check_hashes(target, old)
        except Damage as damage:
            quarantine(self.directory, manifest.step, str(damage))
            return False
        if differing := sorted(dict(old.files.items() ^ manifest.files.items())):
            raise CheckpointSaveError(
                f"Step {manifest.step} is already saved in {target}, and differs in {', '.join(differing)} "
                f"(then: {old.versions}, now: {manifest.versions}). It was kept; the new one was not saved."
            )
        return True

    def _newest_good(self, read: Callable[[int], Found]) -> Found | None:
        damaged: list[str] = []
        tried: set[int] = set()
        while (step := self.processes.from_first(lambda: self._newest_but(tried))) is not None:
            tried.add(step)
            try:
                return replace(self.processes.agree(partial(read, step)), warnings=tuple(damaged))
            except (Damage, OSError) as error:
                damaged += self.processes.from_first(partial(self._put_aside, step, error))
        self.processes.from_first(lambda: self._require_none(damaged))
        return None

    def _newest_but(self, tried: set[int]) -> int | None:
        return max((step for step in self.steps() if step not in tried), default=None)

    def _require_none(self, damaged: list[str]) -> None:
        if damaged or self.has_damaged():
            listing = "".join(f"\n  {warning}" for warning in damaged)
            raise DamagedCheckpointError(
                f"No good checkpoint is left in {self.directory}.{listing}\n"
                "Restore one from a copy (a folder step-...), or start anew: choose another run.name, or delete "
                f"{self.directory}."
            )

    def _put_aside(self, step: int, error: Damage | OSError) -> list[str]:
        """Move a checkpoint that could not be read; a warning, if it is still there.

        Raises:
            UserError: the checkpoint is not at fault.
        """
        path = self.directory / step_name(step)
        if not os.path.lexists(path):
            return []  # deleted meanwhile by the process that trains, which has saved a newer one
        if isinstance(error, OSError) and error.errno != EIO:  # no right to read, say
            raise UserError(f"{path} can't be read: {error}") from error
        message = f"Checkpoint {step_name(step)} is damaged ({error})"
        try:
            place = quarantine(self.directory, step, str(error))
        except OSError as failure:
            return [f"{message}. It was passed over, and could not be moved: {failure}."]
        return [f"{message}. It was moved to {place}."]

    def _verify(self, step: int) -> Found:
        found, _ = self._open(step)
        if self.cfg.verify:
            check_hashes(found.path, self._share(found.manifest))
        return found

    def _share(self, manifest: Manifest) -> Manifest:
        """`manifest` with those files that this process checks."""
        names = sorted(manifest.files)[self.processes.rank :: self.processes.size]
        return replace(manifest, files={name: manifest.files[name] for name in names})

    def _read(self, step: int, tensors: dict[str, Tensor], kinds: dict[str, Kind], only: str) -> Found:
        """Hash the files and read them at once: what was read counts only when the hashes are right."""
        found, reader = self._open(step)
        check_same_tensors(reader.checked, kinds, only=only)
        share = self._share(found.manifest)
        with ThreadPoolExecutor(1) as helper:
            verified = helper.submit(check_hashes, found.path, share) if self.cfg.verify else None
            try:
                read_tensors(reader, tensors)
            except Exception:  # damage, or a fault of the device: the hashes tell
                check_hashes(found.path, found.manifest)
                raise
            if verified is not None:
                verified.result()
        return found

    def _open(self, step: int) -> tuple[Found, CheckedReader]:
        """Everything but the tensors, checked: manifest, sizes, metadata, state."""
        path = self.directory / step_name(step)
        manifest = read_manifest(path)
        check_sizes(path, manifest)
        metadata = read_listed(path / METADATA_FILE, manifest, limit=MAX_METADATA_BYTES)
        checked = read_metadata(metadata, manifest.files)
        state = parse_json(read_listed(path / STATE_FILE, manifest, limit=MAX_JSON_BYTES), STATE_FILE)
        if not isinstance(state, dict):
            raise Damage(f"{STATE_FILE} is not an object")
        found = Found(step=step, path=path, state=state, manifest=manifest)
        return found, CheckedReader(path, checked)


def _check_space(directory: Path, kinds: dict[str, Kind]) -> None:
    """Raise CheckpointSaveError unless a checkpoint of tensors of `kinds` fits on the disk."""
    needed = sum(kind.nbytes + BYTES_PER_TENSOR for kind in kinds.values()) + SPARE_BYTES
    free = free_bytes(directory)
    if free < needed:
        raise CheckpointSaveError(
            f"A checkpoint needs {needed:,} bytes ({needed / 2**30:.2f} GiB), and {free:,} ({free / 2**30:.2f} GiB) "
            f"are free in {directory}. Free some space, or keep fewer checkpoints (checkpoint.keep)."
        )


def _encode(state: dict[str, Any]) -> bytes:
    encoded = json.dumps(state, indent=1)
    if json.loads(encoded) != state:
        raise ValueError(
            "The state is not plain JSON: it would come back changed (keys that are no strings, tuples, NaN)."
        )
    return encoded.encode() + b"\n"
