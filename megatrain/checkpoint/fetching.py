"""Checkpoints of a durable tier on this machine: in a run's directory, or in the cache, to be looked at."""

import hashlib
import shutil
from pathlib import Path

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.inspect import Progress
from megatrain.checkpoint.listing import CHECKPOINTS, is_complete
from megatrain.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatrain.checkpoint.retention import STEP_NAME, quarantine, step_name
from megatrain.checkpoint.tier import Tier
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.paths import cache_dir


def split_address(url: str) -> tuple[str, int | None]:
    """Return the URL of a run, and the step if `url` is that of one of its checkpoints."""
    run, _, name = url.rstrip("/").rpartition("/")
    if not STEP_NAME.fullmatch(name):
        return url, None
    return run.removesuffix(f"/{CHECKPOINTS}"), int(name.removeprefix("step-"))


def fetch_newest(
    tier: Tier, directory: Path, *, newer_than: int, progress: Progress
) -> tuple[Path | None, list[str]]:
    """Copy the newest intact checkpoint of a step above `newer_than` into `directory`.

    Returns its path, None if there is none, and a warning for each damaged one that was skipped.

    Raises:
        UserError: the tier can't be reached, or the disk is full, for instance.
    """
    warnings: list[str] = []
    for step in reversed(tier.steps()):
        if step <= newer_than:
            break
        try:
            return fetch_step(tier, step, directory, progress=progress), warnings
        except CorruptCheckpointError as error:
            warnings.append(f"Checkpoint {tier.address(step)} is damaged ({error}). It was skipped.")
    return None, warnings


def fetch_step(tier: Tier, step: int, directory: Path, *, progress: Progress) -> Path:
    """Copy the checkpoint of `step` into `directory`, unless the same one is there; return its path.

    Raises:
        CorruptCheckpointError: the tier's checkpoint is damaged.
        UserError: the tier can't be reached, or the disk is full, for instance.
    """
    target = directory / step_name(step)
    manifest = tier.manifest(step)
    if target.exists():
        if is_complete(target) and read_manifest(target) == manifest:
            return target
        quarantine(directory, step, f"it is not complete, or not the one in {tier.address(step)}")
    total = sum(record.size for record in manifest.files.values()) or 1
    sizes: list[int] = []  # of the pieces that were fetched; appending is atomic

    def seen(size: int) -> None:
        sizes.append(size)
        if len(sizes) % 64 == 0:
            progress(f"fetching {step_name(step)}", min(sum(sizes) / total, 1.0))

    return tier.fetch(step, directory, seen=seen)


def cached_checkpoint(url: str, *, progress: Progress) -> tuple[Path, list[str]]:
    """Return a copy in the cache of the checkpoint at `url`, or of the newest intact one of the run there.

    The cache holds one checkpoint for each URL. Returns its path and warnings about damaged ones.

    Raises:
        UserError: there is none, or the tier can't be reached.
        DamagedCheckpointError: it is damaged, or all are.
    """
    run, step = split_address(url)
    tier = Tier(run)
    steps = tier.steps()
    if not steps or step not in (None, *steps):
        raise UserError(f"{url}: there is no checkpoint at this address")
    directory = cache_dir() / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16] / CHECKPOINTS
    warnings: list[str] = []
    if step is None:
        path, warnings = fetch_newest(tier, directory, newer_than=-1, progress=progress)
        if path is None:
            raise DamagedCheckpointError("\n".join([f"No intact checkpoint is left at {url}.", *warnings]))
    else:
        try:
            path = fetch_step(tier, step, directory, progress=progress)
        except CorruptCheckpointError as error:
            raise DamagedCheckpointError(f"{url} is damaged: {error}. It was left as it is.") from None
    for other in directory.iterdir():
        if other != path and (other.name.startswith("step-") or other.name == "quarantine"):
            shutil.rmtree(other, ignore_errors=True)
    assert (path / MANIFEST_FILE).is_file()
    return path, warnings
