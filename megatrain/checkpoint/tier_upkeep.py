"""What a person does with the checkpoints of a durable tier: verify, prune and copy them."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.fetching import fetch_step, split_address
from megatrain.checkpoint.inspect import Damage, Progress, Verified, require_whole
from megatrain.checkpoint.listing import Listed
from megatrain.checkpoint.manifest import MANIFEST_FILE
from megatrain.checkpoint.retention import step_name
from megatrain.checkpoint.tier import Tier
from megatrain.checkpoint.tier_listing import list_tier
from megatrain.checkpoint.upkeep import copy_checkpoint
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.urls import is_url, reachable


def verify_tier(tier: Tier, step: int | None, *, progress: Progress) -> list[Verified]:
    """Read every byte of one checkpoint of a tier, or of all, and compare it with the manifest; nothing is changed.

    Raises:
        UserError: there is none, or the tier can't be reached.
    """
    steps = tier.steps()
    if not steps or step not in (None, *steps):
        raise UserError(f"{tier.url if step is None else tier.address(step)}: there is no checkpoint")
    return [_verified(tier, each, progress) for each in steps if step in (None, each)]


def prune_tier(tier: Tier, keep: int, *, dry_run: bool, progress: Progress) -> list[Listed]:
    """Remove all but the newest `keep` good checkpoints and unfinished uploads of older steps; return what is gone.

    Damaged ones newer than the oldest kept one stay. Every hash of the kept ones is checked first.

    Raises:
        UserError: the tier can't be reached.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: must be at least 1")
    good, oldest, removals = 0, None, []
    for each in reversed(list_tier(tier)):
        if good == keep and oldest is not None and each.step < oldest:
            removals.append(each)
        elif each.state == "complete" and not _verified(tier, each.step, progress).damages:
            good, oldest = good + 1, each.step
    if not dry_run:
        for each in removals:
            with reachable(tier.url):
                tier.remove(each.step)
    return removals[::-1]


def copy_anywhere(source: str, destination: str, *, progress: Progress) -> str:
    """Copy a checkpoint from or to a URL, or both; return where the copy is.

    Raises:
        UserError: there is no such checkpoint, it exists at the destination, or a place can't be reached.
        DamagedCheckpointError: it is damaged.
    """
    if not is_url(source):
        return _to_tier(Path(source), destination, progress)
    run, step = split_address(source)
    tier = Tier(run)
    steps = tier.steps()
    if not steps or step not in (None, *steps):
        raise UserError(f"{source}: there is no checkpoint at this address")
    with tempfile.TemporaryDirectory(
        dir=None if is_url(destination) else _nearest(Path(destination))
    ) as folder:
        try:
            fetched = fetch_step(tier, steps[-1] if step is None else step, Path(folder), progress=progress)
        except CorruptCheckpointError as error:
            raise DamagedCheckpointError(f"{source} is damaged: {error}. It was not copied.") from None
        if is_url(destination):
            return _to_tier(fetched, destination, progress)
        return str(copy_checkpoint(fetched, Path(destination), progress=progress))


def _to_tier(source: Path, destination: str, progress: Progress) -> str:
    require_whole(source, progress=progress)
    tier, step = Tier(destination), int(source.name.removeprefix("step-"))
    if step in tier.steps():
        raise UserError(f"{tier.address(step)} exists already, and nothing is overwritten. Copy elsewhere.")
    with reachable(tier.url):
        tier.upload(source, require_owner=lambda: None)
    return tier.address(step)


def _nearest(path: Path) -> Path:
    """Return the nearest directory above `path`, or itself, that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def _verified(tier: Tier, step: int, progress: Progress) -> Verified:
    place, damages = tier.address(step), []
    try:
        manifest = tier.manifest(step)
    except CorruptCheckpointError as error:
        return Verified(place, (Damage(MANIFEST_FILE, str(error).removeprefix(f"{MANIFEST_FILE} ")),), 0)
    except UserError as error:
        return Verified(place, (), 0, unknown=str(error))
    total, seen = sum(record.size for record in manifest.files.values()), _counter(step, progress)
    seen(0, total)
    for name, record in manifest.files.items():
        try:
            with reachable(tier.url):
                found = tier.hash_file(manifest, name, seen=lambda size: seen(size, total))
        except UserError as error:
            return Verified(place, (), 0, unknown=str(error))
        if found is None:
            damages.append(Damage(name, "is missing"))
        elif found.size != record.size:
            damages.append(Damage(name, f"has {found.size:,} bytes instead of {record.size:,}"))
        elif found != record:
            damages.append(Damage(name, "was changed: its hash is wrong"))
    return Verified(place, tuple(damages), total)


def _counter(step: int, progress: Progress) -> Callable[[int, int], None]:
    done = 0

    def seen(size: int, total: int) -> None:
        nonlocal done
        done += size
        progress(f"hashing {step_name(step)}", min(done / (total or 1), 1.0))

    return seen
