"""Imported runs: how one is written, at step 0 and all at once, and how training takes up its weights."""

import contextlib
import ctypes
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatrain.checkpoint.errors import CheckpointSaveError, CorruptCheckpointError, UnknownFormatError
from megatrain.checkpoint.reader import TensorSpec
from megatrain.checkpoint.rows import lazy_tensor
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.config.load import dump, load
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.tokenizer import HuggingFaceTokenizer
from megatrain.data.tokenizer_files import read_tokenizer
from megatrain.models.config import ModelConfig
from megatrain.nn.config import ClassifierConfig
from megatrain.nn.contract import CLASSIFIER
from megatrain.observe.rundir import RunLog
from megatrain.train.adopt import names_of
from megatrain.train.config import Config, RunConfig
from megatrain.train.files import IMPORT_FILE, new_run_id, read_config, tokenizer_digest, write_config
from megatrain.train.restore import WEIGHTS
from megatrain.train.state import TrainState

SEQ_LEN = 4096
"""Sequence length in tokens in the imported run's config, or the model's maximum if that is smaller."""
OPTIMIZER = "optim."
"""Prefix of the names of the optimizer's state in checkpoints."""
M_MMAP_THRESHOLD = -3
"""Parameter of glibc's mallopt: bytes from which on a block is mapped alone."""
Rows = Callable[[int, int], Tensor]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    cfg: Config
    parameters: int
    files: int
    """Files that were read."""
    has_moments: bool = False
    """Whether the optimizer's state came with the weights."""


def read_model_tokenizer(directory: Path, model: ModelConfig) -> HuggingFaceTokenizer:
    """Return the tokenizer in a Hugging Face directory, which must fit `model`.

    Raises:
        UserError: there is none, or it has more tokens than the model.
    """
    tokenizer = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(directory)))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding only "
            f"{model.vocab_size} rows"
        )
    return tokenizer


def write_run(
    run: RunConfig,
    model: ModelConfig,
    tokenizer: HuggingFaceTokenizer,
    tensors: Mapping[str, tuple[TensorSpec, Rows]],
    facts: dict[str, object],
    *,
    progress: Progress,
) -> Imported:
    """Write a new run, which appears atomically, with `tensors` as its checkpoint of step 0.

    A tensor's rows are asked for when they are written, a piece at a time, so that memory does not grow with the model.

    Args:
        tensors: name in the checkpoint -> dtype and shape, and the function that returns rows.
        facts: where they come from, for the run's record.

    Raises:
        UserError: the run exists, or can't be written.
    """
    directory = free_directory(run)
    _give_blocks_back()
    described = TokenizerConfig(kind="huggingface", path=str(directory / "tokenizer"))
    data = DataConfig(tokenizer=described)
    if model.classifier is not None:  # which needs labelled rows; those that are trained on are named later
        data = replace(data, kind="classify", path=str(directory))
    plain = Config(run=run, model=model, data=data, seq_len=min(SEQ_LEN, model.max_seq_len))
    cfg = load(Config, dump(plain))
    cfg = replace(cfg, run=replace(cfg.run, id=new_run_id()))
    partial = directory.parent / f".{directory.name}-{uuid.uuid4().hex[:12]}"
    parameters = sum(spec.size.numel() for name, (spec, _) in tensors.items() if name.startswith(WEIGHTS))
    facts = facts | {"model": model.kind, "parameters": parameters}
    try:
        partial.mkdir(parents=True)
        tokenizer.save(partial / "tokenizer")
        tokenizer.save_pretrained(
            partial / "tokenizer"
        )  # names the end-of-text token for data.tokenizer.path
        state = {"step": 0, "tokens": 0, "watch": {}}
        info = {"run_id": cfg.run.id, "config": dump(cfg), "tokenizer_sha256": tokenizer_digest(partial)}
        Checkpointer(partial / "checkpoints", cfg.checkpoint).save(
            0, _counted(tensors, progress), state, info
        )
        write_config(partial, cfg)
        (partial / IMPORT_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        RunLog(partial, cfg.run.id).event("import", **facts)
        if directory.exists():
            directory.rmdir()
        os.rename(partial, directory)
    except (OSError, CheckpointSaveError) as error:
        raise UserError(f"{directory} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    has_moments = any(name.startswith(OPTIMIZER) for name in tensors)
    return Imported(cfg, parameters, 0, has_moments)


def free_directory(run: RunConfig) -> Path:
    """Return the directory of a run that does not exist yet.

    Raises:
        UserError: it exists.
    """
    directory = Path(run.dir) / run.name
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already. Remove it, or import under another run.name.")
    return directory


def _give_blocks_back() -> None:
    """Let glibc return freed blocks of a megabyte and more to the system: it keeps holes that no later one fits."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _counted(tensors: Mapping[str, tuple[TensorSpec, Rows]], progress: Progress) -> dict[str, Tensor]:
    """Return the tensors to save, whose rows are counted as they are read, by several threads."""
    total = sum(spec.nbytes for spec, _ in tensors.values()) or 1
    lock, done = threading.Lock(), 0

    def counted(read: Rows) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            nonlocal done
            found = read(start, stop)
            with lock:
                done += found.numel() * 4
                progress("importing", min(done / total, 1.0))
            return found

        return rows

    return {name: lazy_tensor(spec, counted(read)) for name, (spec, read) in tensors.items()}


def is_untrained_import(directory: Path, checkpointer: Checkpointer) -> bool:
    """Return whether the run in `directory` was imported and has not been trained since."""
    return (directory / IMPORT_FILE).is_file() and checkpointer.steps() == [0]


def require_imported_weights(directory: Path, checkpointer: Checkpointer) -> None:
    """Refuse to start an imported run anew, from random weights or without its own damaged checkpoints.

    Raises:
        UserError: the imported weights are gone.
        DamagedCheckpointError: the run's own checkpoints are damaged, and only the imported weights are left.
    """
    if not (directory / IMPORT_FILE).is_file():
        return
    if not checkpointer.steps() and not checkpointer.has_damaged():
        raise UserError(
            f"{directory} was imported, and has no checkpoint any more: it would start from random weights. Import the "
            "model again under another run.name."
        )
    if checkpointer.steps() == [0] and checkpointer.has_damaged():
        raise DamagedCheckpointError(
            f"The checkpoints that {directory} saved in training are damaged; only the imported weights are intact. To "
            "train from them again, import the model under another run.name."
        )


def take_up_weights(
    checkpointer: Checkpointer, state: TrainState, *, step: int | None = None, moments: bool = False
) -> VerifiedCheckpoint:
    """Load the weights of an imported or adopted run into `state`: those of `step`, or the newest.

    Args:
        moments: load the optimizer's state too, if the checkpoint has all that this optimizer keeps.

    Raises:
        UserError: there is no checkpoint, or the model has other tensors.
        DamagedCheckpointError: the checkpoint is damaged.
    """
    everything = state.tensors()
    kept = [name for name in everything if name.startswith(OPTIMIZER)]
    every = {name for part in checkpointer.processes.gather(kept) for name in part}
    takes = moments and checkpointer.processes.from_first(lambda: _has_state(checkpointer, every))
    prefixes: tuple[str, ...] = (WEIGHTS, OPTIMIZER) if takes else (WEIGHTS,)
    tensors = {name: tensor for name, tensor in everything.items() if name.startswith(prefixes)}
    keeps_head = True
    if state.parallel.plan.has_classifier:
        own = state.parallel.models[-1].cfg.classifier
        keeps_head = checkpointer.processes.from_first(lambda: has_labels(checkpointer, own))
    if not keeps_head:
        tensors.pop(f"{WEIGHTS}{CLASSIFIER}.weight", None)  # stays as it was initialized
        prefixes = names_of(tensors, state.parallel.plan, checkpointer.processes)
    found = checkpointer.load(tensors, only=prefixes, step=step)
    if found is None:
        raise UserError(f"{checkpointer.directory} has no checkpoint")
    state.take_up(tensors)
    if not keeps_head:
        place = checkpointer.directory.parent
        told = f"The classifier's head begins anew: {place} has none, or one for other labels."
        found = replace(found, warnings=(*found.warnings, told))
    if state.average is not None:
        for name, average in state.average.averages.items():
            average.copy_(state.weights.parameters[name].detach())
    return found


def has_labels(checkpointer: Checkpointer, own: ClassifierConfig | None) -> bool:
    """Return whether the run of the checkpoints classifies with the labels of `own`, in their order."""
    theirs = read_config(checkpointer.directory.parent).model.classifier
    if theirs is None or own is None:
        return False
    return (theirs.labels, theirs.multi_label) == (own.labels, own.multi_label)


def _has_state(checkpointer: Checkpointer, wanted: set[str]) -> bool:
    """Return whether the state of an optimizer in the newest checkpoint has the names `wanted`."""
    try:
        stored = checkpointer.open(checkpointer.steps()[-1]).tensor_specs()
    except (CorruptCheckpointError, UnknownFormatError, OSError, IndexError):  # loading says what is wrong
        return False
    return bool(wanted) and wanted == {name for name in stored if name.startswith(OPTIMIZER)}
