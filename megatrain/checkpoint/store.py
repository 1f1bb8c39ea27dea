"""Saving and loading of checkpoints: each appears by an atomic rename, and is loaded only if every byte is intact.

checkpoints/step-00000100/
  __0_0_0.distcp, .metadata   tensors, as torch.distributed.checkpoint writes them (plain torch can read them)
  state.json                  everything that is not a tensor
  manifest.json               size and SHA-256 of each file, versions, metadata of the run
"""

import contextlib
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
from megatrain.checkpoint.contents import differing_files, new_cipher, new_manifest, read_contents
from megatrain.checkpoint.errors import CheckpointSaveError, CorruptCheckpointError
from megatrain.checkpoint.files import make_directory, sync_directory, write_file
from megatrain.checkpoint.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    Manifest,
    check_hashes,
    check_sizes,
    encode_state,
    read_manifest,
)
from megatrain.checkpoint.reader import (
    CheckedReader,
    TensorSpec,
    check_same_tensors,
    read_tensors,
    spec_of,
)
from megatrain.checkpoint.retention import (
    TEMPORARY,
    committed_steps,
    prune,
    quarantine,
    quarantined,
    remove_leftovers,
    shortened,
    step_name,
    unique_name,
)
from megatrain.checkpoint.space import has_space, require_space
from megatrain.checkpoint.writer import write_tensors
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.ownership import StaleOwnerError
from megatrain.runtime.processes import Processes


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files were verified, with a warning for each newer one that was damaged."""

    step: int
    path: Path
    state: dict[str, Any]
    manifest: Manifest
    warnings: tuple[str, ...] = ()


class Checkpointer:
    """The checkpoints of one run, in `directory`.

    A step is saved once, into a temporary directory that is renamed to its final name last. The latest one is found by
    the directory names; there is no pointer file. All `processes` of the run save and load together, each its own
    shards of the tensors; the first process names, commits and deletes checkpoints.
    """

    def __init__(
        self,
        directory: Path,
        cfg: CheckpointConfig,
        processes: Processes | None = None,
        *,
        moves_damaged: bool = True,
    ) -> None:
        """Take up the checkpoints in `directory`, which need not exist.

        Args:
            moves_damaged: move damaged checkpoints to `quarantine/`; only the run's own processes may.
        """
        self.directory = directory
        self.cfg = cfg
        self.processes = processes or Processes()
        self.require_owner: Callable[[], None] = lambda: None
        """Called immediately before a commit; raises if the run directory belongs to another process."""
        self.on_commit: Callable[[int], None] = lambda step: None
        """Called with each step that was committed, by the process that commits."""
        self.in_use: Callable[[], set[int]] = set
        """Returns steps that are not deleted now, since their files are being read."""
        self.saved_bytes = 0
        """Size of the last checkpoint that was saved here, in bytes."""
        self._moves_damaged = moves_damaged
        self._parent: str | None = None

    def steps(self) -> list[int]:
        """Return the committed steps in ascending order, from the directory names alone."""
        return committed_steps(self.directory)

    def has_damaged(self) -> bool:
        """Return whether damaged checkpoints were quarantined here; if there are no intact ones, loading fails."""
        return bool(quarantined(self.directory))

    def remove_leftovers(self) -> None:
        """Delete partly written checkpoints of killed processes; the first process of a run calls this at its start."""
        remove_leftovers(self.directory)

    def preflight(self, tensors: dict[str, Tensor]) -> None:
        """Check before training, not at the first save, that checkpoints of `tensors` can be written.

        Raises:
            UserError: the directory is not writable, the disk has no space for one checkpoint, or there is no key.
        """
        specs = self._global_specs(tensors)
        self._check_key()
        self.processes.from_first(lambda: self._check_writable(specs))

    def _check_key(self) -> None:
        """Check that every process has the same key, if checkpoints are encrypted.

        Raises:
            UserError: one has none, or another.
        """
        cipher = self.processes.agree(lambda: new_cipher(self.cfg.encryption, 0))
        ids = {each for each in self.processes.gather(cipher and cipher.key.id) if each}
        if len(ids) > 1:
            raise UserError(
                f"The processes of this run have different keys ({', '.join(sorted(ids))}). Give all of them the same."
            )

    def _check_writable(self, specs: dict[str, TensorSpec]) -> None:
        probe = self.directory / unique_name(TEMPORARY, 0)
        try:
            make_directory(self.directory)
            probe.mkdir()
            write_file(probe / "probe", b"probe")
            require_space(self.directory, specs)
        except (OSError, CheckpointSaveError) as error:
            raise UserError(f"Checkpoints cannot be written to {self.directory}: {error}") from None
        finally:
            shutil.rmtree(probe, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        info: dict[str, Any] | None = None,
        *,
        specs: dict[str, TensorSpec] | None = None,
    ) -> Path:
        """Commit a checkpoint of `step`, delete the oldest ones, and return the committed directory.

        `state` (restored on loading) and `info` (a description of the run) are JSON. A step that exists already is
        kept as it is, if it is the same byte for byte.

        Args:
            specs: specs of the global tensors, where `tensors` are copies of shards that do not know them.

        Raises:
            CheckpointSaveError: nothing was committed (no space, a disk error, a different checkpoint of that step);
                earlier checkpoints are untouched.
            ValueError: `state` does not survive a round trip through JSON.
        """
        encoded = encode_state(state)
        specs = self._gathered(specs or {name: spec_of(tensor) for name, tensor in tensors.items()})
        staging = self.directory / self.processes.from_first(lambda: unique_name(TEMPORARY, step))
        cipher = self.processes.agree(lambda: new_cipher(self.cfg.encryption, step))
        try:
            self.processes.from_first(lambda: self._create_staging(staging, step, specs))
            own = self.processes.agree(lambda: write_tensors(staging, tensors, self.processes.group, cipher))
            files = {name: record for part in self.processes.gather(own) for name, record in part.items()}
            manifest = new_manifest(step, files, info or {}, self._parent, cipher)
            state_bytes = encoded if cipher is None else cipher.encrypt(encoded, STATE_FILE)
            path = self.processes.from_first(
                lambda: self._write_state_and_commit(staging, manifest, state_bytes)
            )
        except OSError as error:
            raise CheckpointSaveError(
                f"The checkpoint of step {step} was not saved in {self.directory}: {error}. "
                "Earlier checkpoints are untouched."
            ) from error
        finally:
            if self.processes.is_first:
                shutil.rmtree(staging, ignore_errors=True)
        self._parent = path.name
        self.saved_bytes = sum(record.size for record in manifest.files.values())
        if self.processes.is_first:
            self.on_commit(step)
            with contextlib.suppress(StaleOwnerError):  # this process's next write says so
                self.require_owner()
                prune(self.directory, self.cfg, spare=self.in_use())
        return path

    def _create_staging(self, staging: Path, step: int, specs: dict[str, TensorSpec]) -> None:
        if not self.directory.is_dir():
            self.require_owner()  # one that was removed is not made anew
            make_directory(self.directory)
        if self.cfg.on_error == "warn" and not has_space(self.directory, specs):
            self.require_owner()
            prune(self.directory, self.cfg, adding=step, spare=self.in_use())
        require_space(self.directory, specs)
        staging.mkdir()

    def _write_state_and_commit(self, staging: Path, manifest: Manifest, state: bytes) -> Path:
        """Write state and manifest, and commit."""
        manifest.files[STATE_FILE] = write_file(staging / STATE_FILE, state)
        write_file(staging / MANIFEST_FILE, manifest.render())
        sync_directory(staging)
        return self._commit(staging, manifest)

    def _global_specs(self, tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
        """Return dtype and global shape of the tensors of all processes."""
        return self._gathered({name: spec_of(tensor) for name, tensor in tensors.items()})

    def _gathered(self, own: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the specs of all processes; with a pipeline no process has all tensors."""
        return {name: spec for part in self.processes.gather(own) for name, spec in part.items()}

    def latest(self) -> VerifiedCheckpoint | None:
        """Find and verify the newest intact checkpoint without loading it; return None if there never was one.

        A damaged one is moved to `quarantine/` with the reason, and the next older one is tried.

        Raises:
            DamagedCheckpointError: there are checkpoints, and none is intact.
        """
        return self._newest_intact(self._verify)

    def open(self, step: int) -> CheckedReader:
        """Return a reader of a checkpoint found by `latest`, to read some of its tensors with `read_tensors`."""
        return self._open(step)[1]

    def load(
        self, tensors: dict[str, Tensor], *, only: str | tuple[str, ...] = "", step: int | None = None
    ) -> VerifiedCheckpoint | None:
        """Read the newest intact checkpoint into `tensors`, in place; return None if there never was one.

        `step` asks for the checkpoint of that step.

        Names, shapes and dtypes must match the saved ones exactly; `only` restricts the saved ones to names that
        start with it, or with one of them. After an error the values in `tensors` are undefined.

        Raises:
            DamagedCheckpointError: there are checkpoints, and none is intact.
            CheckpointMismatchError: the checkpoint is intact, but its tensors are others.
        """
        specs = self._global_specs(tensors)
        found = self._newest_intact(lambda step: self._read(step, tensors, specs, only), step)
        if found is not None:
            self._parent = found.path.name
        return found

    def _commit(self, staging: Path, manifest: Manifest) -> Path:
        """Give the staging directory its final name, unless the same checkpoint exists already."""
        target = self.directory / step_name(manifest.step)
        if os.path.lexists(target) and self._is_identical(staging, manifest):
            return target
        self.require_owner()
        os.rename(staging, target)  # fails if the name has appeared since
        sync_directory(self.directory)
        return target

    def _is_identical(self, staging: Path, manifest: Manifest) -> bool:
        """Return whether the step is already saved with identical files; quarantine it if it is damaged.

        Raises:
            CheckpointSaveError: it is intact, but differs.
        """
        target = self.directory / step_name(manifest.step)
        try:
            old = read_manifest(target)
            check_sizes(target, old)
            check_hashes(target, old)
            differing = differing_files(target, old, staging, manifest)
        except CorruptCheckpointError as damage:
            quarantine(self.directory, manifest.step, str(damage))
            return False
        if differing:
            raise CheckpointSaveError(
                f"Step {manifest.step} is already saved in {target}, but differs in {', '.join(differing)} "
                f"(then: {old.versions}, now: {manifest.versions}). It was kept; the new one was not saved."
            )
        return True

    def _newest_intact(
        self, read: Callable[[int], VerifiedCheckpoint], only_step: int | None = None
    ) -> VerifiedCheckpoint | None:
        """Apply `read` to the newest checkpoint, and to older ones while it raises; quarantine the damaged ones."""
        damaged: list[str] = []
        tried: set[int] = set()
        while True:
            step, warnings = self.processes.from_first(partial(self._newest_untried, tried, only_step))
            damaged += warnings
            if step is None:
                break
            try:
                found = self.processes.agree(partial(read, step))
                return replace(found, warnings=tuple(shortened(damaged, self.directory)))
            except (CorruptCheckpointError, OSError) as error:
                damaged += self.processes.from_first(partial(self._set_aside, step, error))
        self.processes.from_first(lambda: self._require_none(damaged))
        return None

    def _newest_untried(self, tried: set[int], only_step: int | None) -> tuple[int | None, list[str]]:
        """Return the newest step whose files are all there, and add it to `tried`; quarantine those that lack some.

        One process does that alone, and lists the directory once, unless a step vanishes: of many that are obviously
        damaged, each takes little time.
        """
        warnings: list[str] = []
        steps = self.steps()
        while untried := {step for step in steps if only_step in (None, step)} - tried:
            tried.add(step := max(untried))
            path = self.directory / step_name(step)
            try:
                check_sizes(path, read_manifest(path))
            except (CorruptCheckpointError, OSError) as error:
                found = self._set_aside(step, error)
                warnings += found
                if not found:
                    steps = self.steps()
            else:
                return step, warnings
        return None, warnings

    def _require_none(self, damaged: list[str]) -> None:
        if damaged or self.has_damaged():
            listing = "".join(f"\n  {warning}" for warning in shortened(damaged, self.directory))
            raise DamagedCheckpointError(
                f"No intact checkpoint is left in {self.directory}.{listing}\n"
                "Restore one (a directory step-...) from a backup, or start a new run: choose another run.name or "
                f"delete {self.directory}."
            )

    def _set_aside(self, step: int, error: CorruptCheckpointError | OSError) -> list[str]:
        """Quarantine a checkpoint that could not be read, and return a warning if it still exists.

        Raises:
            UserError: the checkpoint is not at fault.
        """
        path = self.directory / step_name(step)
        if not os.path.lexists(path):
            return []  # deleted meanwhile by the training process, which has saved a newer one
        if isinstance(error, OSError) and error.errno != EIO:  # for example, no read permission
            raise UserError(f"{path} cannot be read: {error}") from error
        message = f"Checkpoint {step_name(step)} is damaged ({error})"
        if not self._moves_damaged:
            return [f"{message}. It was skipped; the run itself moves it away when it is resumed."]
        try:
            place = quarantine(self.directory, step, str(error))
        except OSError as failure:
            return [f"{message}. It was skipped, and could not be moved: {failure}."]
        return [f"{message}. It was moved to {place}."]

    def _verify(self, step: int) -> VerifiedCheckpoint:
        found, _ = self._open(step)
        if self.cfg.verify:
            check_hashes(found.path, self._files_to_check(found.manifest))
        return found

    def _files_to_check(self, manifest: Manifest) -> Manifest:
        """Return `manifest` restricted to the files that this process checks; the processes divide them among them."""
        names = sorted(manifest.files)[self.processes.rank :: self.processes.size]
        return replace(manifest, files={name: manifest.files[name] for name in names})

    def _read(
        self, step: int, tensors: dict[str, Tensor], specs: dict[str, TensorSpec], only: str | tuple[str, ...]
    ) -> VerifiedCheckpoint:
        """Read `tensors` in place while the files are hashed; the result counts only if the hashes are right."""
        found, reader = self._open(step)
        check_same_tensors(reader.checked, specs, only=only)
        share = self._files_to_check(found.manifest)
        with ThreadPoolExecutor(1) as helper:
            verified = helper.submit(check_hashes, found.path, share) if self.cfg.verify else None
            try:
                read_tensors(reader, tensors)
            except Exception:  # a damaged file or a device error: the hashes tell which
                check_hashes(found.path, found.manifest)
                raise
            if verified is not None:
                verified.result()
        return found

    def _open(self, step: int) -> tuple[VerifiedCheckpoint, CheckedReader]:
        """Read and check everything but the tensors: manifest, sizes, metadata, state."""
        path = self.directory / step_name(step)
        manifest = read_manifest(path)
        state, reader = read_contents(path, manifest)
        return VerifiedCheckpoint(step=step, path=path, state=state, manifest=manifest), reader
