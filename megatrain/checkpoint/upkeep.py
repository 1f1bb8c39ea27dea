"""What a person does with checkpoints: prune, copy, consolidate. Nothing is overwritten, nothing left half-done."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatrain.checkpoint.compare import natural
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.files import free_bytes, make_directory, sync_directory, write_file, write_stream
from megatrain.checkpoint.inspect import Opened, Progress, kind_of, naming, open_checkpoint, require_whole
from megatrain.checkpoint.listing import CHECKPOINTS, Listed, list_checkpoints, run_of
from megatrain.checkpoint.manifest import MANIFEST_FILE, Manifest, check_hashes, check_sizes, read_bounded
from megatrain.checkpoint.reader import CheckedReader, TensorSpec
from megatrain.checkpoint.retention import TEMPORARY, prune, remove_leftovers, step_name, unique_name
from megatrain.checkpoint.rows import read_pieces
from megatrain.checkpoint.safetensors_file import SafetensorsFile, write_shards
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.ownership import LOCK_FILE, read_owner

SPARE_BYTES = 64 << 10
"""Space for headers and directories, in bytes."""


@dataclass(frozen=True, slots=True)
class Consolidated:
    """What `consolidate` wrote."""

    files: int
    tensors: int
    bytes: int


@contextlib.contextmanager
def idle_run(run: Path | None) -> Iterator[None]:
    """Hold the lock of a run in the `with` block, so that it can't train meanwhile; without a run, nothing is held.

    Raises:
        UserError: it is training.
    """
    if run is None or not run.is_dir():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            # not truncated, unlike a run's own: this is no owner
            lock = stack.enter_context((run / LOCK_FILE).open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = read_owner(run)
            whose = "" if owner is None else f" ({owner})"
            raise UserError(
                f"{run} is training{whose}. Wait for it, or stop it: SIGTERM saves a checkpoint first."
            ) from None
        except OSError as error:
            raise UserError(
                f"{run} can't be locked, so it can't be told whether it is training: {error}"
            ) from None
        yield


def plan_prune(directory: Path, keep: int, *, progress: Progress) -> tuple[list[Listed], int]:
    """Return what pruning `directory` removes, and how many of the newest checkpoints stay: `keep` good ones.

    Damaged ones that are newer than the oldest kept one stay too, since they count as none. Every hash of the kept
    ones is checked, so that the last good checkpoint is never removed in favour of a bad one.
    """
    found = list_checkpoints(directory)
    committed = [each for each in found if each.state in ("complete", "damaged", "unknown")]
    good, stay = 0, 0
    for each in reversed(committed):
        if good == keep:
            break
        stay += 1
        if each.state == "complete":
            with contextlib.suppress(UserError):
                require_whole(Path(each.path), progress=progress)
                good += 1
    leftovers = [each for each in found if each.state in ("unfinished", "being deleted")]
    return [*committed[: len(committed) - stay], *leftovers], stay


def prune_checkpoints(directory: Path, keep: int, *, dry_run: bool, progress: Progress) -> list[Listed]:
    """Remove all but the newest `keep` good checkpoints and what killed processes left; return what is gone.

    Raises:
        UserError: the run is training.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: must be at least 1")
    with idle_run(run_of(directory.absolute())):
        removals, stay = plan_prune(directory, keep, progress=progress)
        if not dry_run and removals:
            prune(directory, CheckpointConfig(keep=stay))
            remove_leftovers(directory)
        return removals if dry_run else [each for each in removals if not os.path.lexists(each.path)]


def copy_checkpoint(source: Path, destination: Path, *, progress: Progress) -> Path:
    """Copy a checkpoint into `destination`, in the `checkpoints/` of a run if it is one; return the copy's path.

    It appears by one rename, after the copy's hashes were found to be those of the manifest.

    Raises:
        UserError: the checkpoint exists there, the disk is too small, or the run there is training.
        DamagedCheckpointError: the source is damaged, or the copy did not come out as it should.
    """
    opened = open_checkpoint(source)
    inner = destination / CHECKPOINTS
    parent = inner if inner.is_dir() or (destination / "config.yaml").is_file() else destination
    target = parent / step_name(opened.manifest.step)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already, and nothing is overwritten. Remove it, or copy elsewhere.")
    with idle_run(run_of(target.absolute())), _writing(target):
        make_directory(parent.absolute())
        _require_space(parent, opened.bytes)
        staging = parent / unique_name(TEMPORARY, opened.manifest.step)
        staging.mkdir()
        try:
            _copy_files(opened, staging, progress)
            os.rename(staging, target)  # fails if the name has appeared since
            sync_directory(parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def consolidate(
    source: Path, target: Path, *, only: str, shard_bytes: int, progress: Progress
) -> Consolidated:
    """Write the tensors of a checkpoint, whole, as safetensors, one at a time, every hash checked before.

    Args:
        target: a new file if it ends with .safetensors, otherwise a new directory of files of about `shard_bytes`.
        only: a kind of `inspect.KINDS`, to write the tensors of that kind alone.

    Raises:
        UserError: `target` exists, the disk is too small, or there is nothing to write.
        DamagedCheckpointError: the checkpoint is damaged.
    """
    if os.path.lexists(target):
        raise UserError(
            f"{target} exists already, and nothing is overwritten. Remove it, or choose another name."
        )
    require_whole(source, progress=progress)
    opened = open_checkpoint(source)
    specs = opened.reader.tensor_specs()
    names = sorted((name for name in specs if not only or kind_of(name) == only), key=natural)
    if not names:
        raise UserError(f"{source} has no tensors of the kind {only}")
    chosen = {name: specs[name] for name in names}
    size = sum(spec.nbytes for spec in chosen.values())
    metadata = {"format": "pt", "step": str(opened.manifest.step), "source": "MegaTrain checkpoint"}
    partial_target = target.absolute().parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    with _writing(target):
        make_directory(partial_target.parent)
        _require_space(partial_target.parent, size)
        try:
            tensors = _whole_tensors(opened.reader, chosen, progress)
            if target.suffix == ".safetensors":
                files = 1
                with SafetensorsFile(partial_target, chosen, metadata) as file:
                    for name, tensor in tensors:
                        file.write(name, tensor)
            else:
                partial_target.mkdir()
                files = write_shards(
                    partial_target, chosen, tensors, shard_bytes=shard_bytes, metadata=metadata
                )
            os.rename(partial_target, target)
        finally:
            shutil.rmtree(partial_target, ignore_errors=True)
            with contextlib.suppress(OSError):
                partial_target.unlink()
    return Consolidated(files, len(names), size)


def _whole_tensors(
    reader: CheckedReader, specs: dict[str, TensorSpec], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    total, done = sum(spec.nbytes for spec in specs.values()) or 1, 0
    for name in specs:
        for rows in read_pieces(reader, name):
            progress("writing", done / total)
            yield name, rows
            done += rows.nbytes


def _copy_files(opened: Opened, staging: Path, progress: Progress) -> None:
    """Copy all files, synced, and check that the copies have the listed hashes."""
    manifest, done = opened.manifest, 0

    def seen(size: int) -> None:
        nonlocal done
        done += size
        progress("copying", done / (opened.bytes or 1))

    for name in sorted(manifest.files):
        with (opened.path / name).open("rb", buffering=0) as file:
            record = write_stream(file, staging / name, seen=seen)
        if record != manifest.files[name]:
            raise DamagedCheckpointError(
                f"{opened.path} is damaged: {name} was changed: its hash is wrong. It was not copied."
            )
    with naming(staging):
        _check_copy(opened.path, staging, manifest)
    sync_directory(staging)


def _check_copy(source: Path, staging: Path, manifest: Manifest) -> None:
    """Add the manifest, byte by byte that of the source, and read the copy again."""
    write_file(staging / MANIFEST_FILE, read_bounded(source / MANIFEST_FILE))
    check_sizes(staging, manifest)
    check_hashes(staging, manifest)


def _require_space(directory: Path, size: int) -> None:
    free = free_bytes(directory)
    if free < size + SPARE_BYTES:
        raise UserError(f"{size + SPARE_BYTES:,} bytes are needed, and {free:,} are free in {directory}.")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
