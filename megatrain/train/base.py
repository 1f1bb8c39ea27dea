"""The run that a new one takes its weights from (`checkpoint.adopt`): all of them at its start, or those that adapters
leave as they are at every start.
"""

import dataclasses
from pathlib import Path

import torch

from megatrain.checkpoint.retention import step_name
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.nn.contract import CLASSIFIER
from megatrain.parallel.lora_config import LoRAConfig
from megatrain.parallel.packed_base import pack_base
from megatrain.train.adopt import WEIGHTS, adopted, describe_base, names_of, tensors_of
from megatrain.train.build import build_model
from megatrain.train.config import Config
from megatrain.train.distill import Distill
from megatrain.train.files import read_config, run_directory
from megatrain.train.grpo import GRPO
from megatrain.train.import_hf import import_once
from megatrain.train.imported import Progress, has_labels
from megatrain.train.objective_config import GRPOConfig
from megatrain.train.state import TrainState


def with_base(cfg: Config, checkpointer: Checkpointer, *, progress: Progress) -> Config:
    """Return `cfg` with a run in place of a Hugging Face directory to adopt, which is imported beside the run.

    Adapters, and objectives that compare with the source, keep to the one checkpoint that they began on: it is named in
    place of its run. Another run that has checkpoints of its own needs no others.

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
    if has_begun and not keeps_base(cfg):
        return cfg
    if (source / "config.json").is_file():
        source = import_once(source, cfg.run.dir, progress=progress)
    if keeps_base(cfg):
        source = _base_of(directory, source) if has_begun else _newest(source, cfg, checkpointer)
    return _with_adopt(cfg, source)


def keeps_base(cfg: Config) -> bool:
    """Return whether the run needs the weights that it began on at every start: beside adapters, or to compare with."""
    return bool(cfg.lora.rank) or (isinstance(cfg.objective, GRPOConfig) and cfg.objective.kl > 0)


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


def load_beside(cfg: Config, checkpointer: Checkpointer, state: TrainState) -> VerifiedCheckpoint | None:
    """Return the checkpoint of the model that the objective compares with, loaded; None if it compares with none."""
    if isinstance(state.objective, GRPO) and keeps_base(cfg):
        return load_reference(cfg, checkpointer, state)
    if not isinstance(state.objective, Distill) or state.objective.checkpoint is None:
        return None
    state.base = describe_base(state.objective.checkpoint)
    return state.objective.checkpoint


def load_reference(cfg: Config, checkpointer: Checkpointer, state: TrainState) -> VerifiedCheckpoint:
    """Load the model that GRPO measures the divergence from: that of the checkpoint that checkpoint.adopt names.

    Raises:
        UserError: there is none, or its model has other tensors.
        DamagedCheckpointError: it is damaged.
    """
    assert isinstance(state.objective, GRPO)
    parallel = state.parallel
    plain = dataclasses.replace(cfg, lora=LoRAConfig())
    dtype = torch.float64 if cfg.train.precision == "fp64" else torch.float32
    reference = build_model(plain, parallel.device, parallel.mesh, master_dtype=dtype)
    tensors = tensors_of(reference)
    other, step = adopted(cfg, checkpointer)
    found = other.load(tensors, only=WEIGHTS, step=step)
    assert found is not None
    if reference.pipeline is not None:
        reference.pipeline.sync_tied_embeddings()
    state.objective.reference = reference
    state.base = describe_base(found)
    return found


def load_base(cfg: Config, checkpointer: Checkpointer, state: TrainState) -> VerifiedCheckpoint:
    """Load the weights that `state` does not train from the checkpoint that checkpoint.adopt names.

    Raises:
        UserError: there is none, or its model has other tensors.
        DamagedCheckpointError: it is damaged.
    """
    other, step = adopted(cfg, checkpointer)
    frozen = state.frozen()
    own = state.parallel.models[-1].cfg.classifier
    if own is not None and other.processes.from_first(lambda: has_labels(other, own)):
        # Trained beside adapters, from what the source has of it; a run that goes on has its own.
        frozen |= {key: t for key, t in state.tensors().items() if key == f"{WEIGHTS}{CLASSIFIER}.weight"}
    found = other.load(frozen, only=names_of(frozen, state.parallel.plan, other.processes), step=step)
    assert found is not None
    state.sync_model_weights()
    pack_base(state.model, state.weights.parameters, cfg.lora)
    state.base = describe_base(found)
    return found
