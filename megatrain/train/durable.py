"""The durable tier of a run: what its start fetches from there, what is uploaded, and runs that are read from a URL."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatrain.checkpoint.errors import UploadError
from megatrain.checkpoint.fetching import cached_checkpoint, fetch_newest, split_address
from megatrain.checkpoint.files import make_directory
from megatrain.checkpoint.inspect import Progress
from megatrain.checkpoint.listing import CHECKPOINTS, is_complete
from megatrain.checkpoint.retention import committed_steps, step_name
from megatrain.checkpoint.tier import Tier
from megatrain.checkpoint.upkeep import idle_run
from megatrain.checkpoint.uploads import Uploader, waiting_steps
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.ownership import read_owner
from megatrain.train.config import Config
from megatrain.train.files import CONFIG_FILE, IMPORT_FILE, TOKENIZER, read_config

RECORDS = (CONFIG_FILE, IMPORT_FILE, "metrics.jsonl", "events.jsonl", "status.json")
"""Files of a run directory that are copied beside the checkpoints, where they exist."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What the start of a run fetched from its durable tier."""

    url: str
    step: int | None = None
    """Step of the checkpoint; None: none was fetched."""
    warnings: tuple[str, ...] = ()


def tier_of(cfg: Config) -> Tier | None:
    """Return the durable tier of the run that `cfg` describes; None if it has none.

    Raises:
        UserError: a package is missing, or the protocol is unknown.
    """
    if cfg.checkpoint.durable is None:
        return None
    return Tier(f"{cfg.checkpoint.durable.rstrip('/')}/{cfg.run.name}")


def fetch_run(cfg: Config, directory: Path, *, progress: Progress) -> Fetched | None:
    """Bring `directory` up to date: fetch the tier's newest intact checkpoint and its records, if they are newer.

    Raises:
        UserError: the tier can't be reached, holds another run, or has checkpoints although train.resume=never.
        DamagedCheckpointError: all checkpoints of the tier are damaged, and there is none here.
    """
    tier = tier_of(cfg)
    if tier is None:
        return None
    ours = read_config(directory).run.id if (directory / CONFIG_FILE).is_file() else cfg.run.id
    theirs = tier.run_id()
    if "" not in (ours, theirs) and ours != theirs:
        raise UserError(
            f"checkpoint.durable: {tier.url} holds another run (id {theirs}) than {directory} (id {ours}). Choose "
            "another run.name or checkpoint.durable."
        )
    steps = tier.steps()
    if steps and cfg.train.resume == "never":
        raise UserError(
            f"train.resume=never, but {tier.url} has checkpoints. Choose another run.name, remove them, or resume with "
            "train.resume=auto."
        )
    checkpoints = directory / CHECKPOINTS
    complete = (
        each for each in reversed(committed_steps(checkpoints)) if is_complete(checkpoints / step_name(each))
    )
    here = next(complete, -1)
    if not steps or steps[-1] <= here:
        return Fetched(tier.url)
    make_directory(directory.absolute())
    with idle_run(directory):
        _fetch_records(tier, directory)
        path, warnings = fetch_newest(tier, checkpoints, newer_than=here, progress=progress)
    if path is None and here < 0:
        raise DamagedCheckpointError("\n".join([f"No intact checkpoint is left in {tier.url}.", *warnings]))
    step = None if path is None else int(path.name.removeprefix("step-"))
    return Fetched(tier.url, step, tuple(warnings))


def begin_uploads(cfg: Config, directory: Path, require_owner: Callable[[], None]) -> Uploader | None:
    """Take the tier of a run that this process owns, and begin to upload the checkpoints that the tier lacks.

    Raises:
        UserError: the tier can't be reached or written.
    """
    tier, owner = tier_of(cfg), read_owner(directory)
    if tier is None or owner is None:
        return None
    tier.take(owner, cfg.run.id)

    def require() -> None:
        require_owner()
        tier.require(owner)

    def records() -> list[Path]:
        tokenizer = sorted((directory / TOKENIZER).iterdir())
        return [*tokenizer, *(path for name in RECORDS if (path := directory / name).is_file())]

    uploader = Uploader(tier, directory, cfg.checkpoint, records=records, require_owner=require)
    uploader.submit(*waiting_steps(tier, directory, cfg.checkpoint))
    return uploader


def finish_uploads(uploader: Uploader, cfg: Config, *, progress: Progress) -> None:
    """Wait for the last upload at the end of a run.

    Raises:
        UploadError: the newest checkpoint is not in the tier, and checkpoint.on_error=stop.
    """
    failed = uploader.finish(progress)
    if failed and cfg.checkpoint.on_error == "stop":
        step = max(failed)
        raise UploadError(
            f"{step_name(step)} was not uploaded to {uploader.tier.url}: {failed[step]}. It is whole on this machine; "
            "start the command again to upload it."
        )


def local_run(place: str, *, progress: Progress) -> tuple[Path, list[str]]:
    """Return a copy in the cache of the run at the URL `place`, and warnings about damaged checkpoints there.

    The copy has one checkpoint: the newest intact one, or the one that the URL names.

    Raises:
        UserError: there is no run at the URL, or it can't be reached.
        DamagedCheckpointError: all its checkpoints are damaged.
    """
    path, warnings = cached_checkpoint(place, progress=progress)
    directory = path.parents[1]
    _fetch_records(Tier(split_address(place)[0]), directory)
    return directory, warnings


def _fetch_records(tier: Tier, directory: Path) -> None:
    """Copy the tier's records into `directory`, each at once."""
    names = [*RECORDS, *(f"{TOKENIZER}/{name}" for name in tier.names(TOKENIZER))]
    for name in names:
        if (content := tier.read(name)) is None:
            continue
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.tmp")
        part.write_bytes(content)
        part.replace(target)
