"""The run that a new one takes its weights from (`checkpoint.adopt`): all of them at its start, or those that adapters
leave as they are at every start.
"""

import dataclasses
from pathlib import Path

from megatrain.checkpoint.retention import step_name
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.train.adopt import adopted, describe_base, names_of
from megatrain.train.config import Config
from megatrain.train.files import read_config, run_directory
from megatrain.train.import_hf import import_once
from megatrain.train.imported import Progress
from megatrain.train.state import TrainState


def with_base(cfg: Config, checkpointer: Checkpointer, *, progress: Progress) -> Config:
    """Return `cfg` with a run in place of a Hugging Face directory to adopt, which is imported beside the run.

    Adapters keep to the one checkpoint that they began on: it is named in place of its run. A run that has checkpoints
    of its own, and trains all weights, needs no others.

    Raises:
        UserError: the directory can't be imported, or the run would adopt its own weights, or adapters others than
            they began on.
    """
    if cfg.checkpoint.adopt is None:
        return cfg
    source, directory = Path(cfg.checkpoint.adopt), run_directory(cfg)
    if source.resolve() == directory.resolve():
        raise UserError(
            f"checkpoint.adopt={source} is the directory of this run itself. Choose another run.name for the new run, "
            "or go on with this one without checkpoint.adopt."
        )
    has_begun = bool(checkpointer.steps())
    if has_begun and not cfg.lora.rank:
        return cfg
    if (source / "config.json").is_file():
        source = import_once(source, cfg.run.dir, progress=progress)
    if cfg.lora.rank:
        source = _base_of(directory, source) if has_begun else _newest(source, cfg, checkpointer)
    return _with_adopt(cfg, source)


def _newest(source: Path, cfg: Config, checkpointer: Checkpointer) -> Path:
    found, step = adopted(_with_adopt(cfg, source), checkpointer)
    return (
        source.absolute() if step is not None else found.directory.absolute() / step_name(found.steps()[-1])
    )


def _base_of(directory: Path, source: Path) -> Path:
    """Return the checkpoint that the adapters of the run in `directory` began on; `source` names it, or its run.

    Raises:
        UserError: it names another.
    """
    known = Path(str(read_config(directory).checkpoint.adopt))
    if source.resolve() not in (known.resolve(), known.parent.parent.resolve()):
        raise UserError(
            f"The adapters in {directory} were begun on {known}, not on {source}. Give that, or start another run with "
            "run.name=..."
        )
    return known


def _with_adopt(cfg: Config, source: Path) -> Config:
    return dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, adopt=str(source)))


def load_base(cfg: Config, checkpointer: Checkpointer, state: TrainState) -> VerifiedCheckpoint:
    """Load the weights that `state` does not train from the checkpoint that checkpoint.adopt names.

    Raises:
        UserError: there is none, or its model has other tensors.
        DamagedCheckpointError: it is damaged.
    """
    other, step = adopted(cfg, checkpointer)
    frozen = state.frozen()
    found = other.load(frozen, only=names_of(frozen, state.parallel.plan, other.processes), step=step)
    assert found is not None
    state.sync_model_weights()
    state.base = describe_base(found)
    return found
