"""The run that a new one takes its weights from (`checkpoint.adopt`)."""

import dataclasses
from pathlib import Path

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.train.config import Config
from megatrain.train.files import run_directory
from megatrain.train.import_hf import import_once
from megatrain.train.imported import Progress


def with_base(cfg: Config, checkpointer: Checkpointer, *, progress: Progress) -> Config:
    """Return `cfg` with a run in place of a Hugging Face directory to adopt, which is imported beside the run.

    A run that has checkpoints of its own needs no other weights.

    Raises:
        UserError: the directory can't be imported, or the run would adopt its own weights.
    """
    if cfg.checkpoint.adopt is None:
        return cfg
    source = Path(cfg.checkpoint.adopt)
    if source.resolve() == run_directory(cfg).resolve():
        raise UserError(
            f"checkpoint.adopt={source} is the directory of this run itself. Choose another run.name for the new run, "
            "or go on with this one without checkpoint.adopt."
        )
    if not (source / "config.json").is_file() or checkpointer.steps():
        return cfg
    run = import_once(source, cfg.run.dir, progress=progress)
    return dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, adopt=str(run)))
