"""Import of a Hugging Face directory as a run at step 0, tensor by tensor: the full model is never in memory."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.config.load import dump, load
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.tokenizer import HuggingFaceTokenizer
from megatrain.data.tokenizer_files import read_tokenizer
from megatrain.models.config import ModelConfig
from megatrain.models.registry import config_from_hf, get_spec
from megatrain.models.spec import WeightMap
from megatrain.observe.rundir import RunLog
from megatrain.train.config import Config, RunConfig
from megatrain.train.files import IMPORT_FILE, new_run_id, tokenizer_digest, write_config
from megatrain.train.restore import WEIGHTS
from megatrain.train.state import TrainState

INDEX = "model.safetensors.index.json"
SEQ_LEN = 4096
"""Sequence length in tokens in the imported run's config, or the model's maximum if that is smaller."""
NOTHING = r"(?!)"


@dataclass(frozen=True)
class Imported:
    cfg: Config
    parameters: int
    files: int


def import_hf(source: Path, run: RunConfig, *, progress: Callable[[str, float], None]) -> Imported:
    """Write the model and tokenizer of `source` as a new run, which appears atomically, with a checkpoint of step 0.

    Weights are stored in float32. A temporary copy of them is kept on disk meanwhile, beside the checkpoint.

    Raises:
        UserError: `source` is not such a directory, its model is not supported, or the run exists.
    """
    directory = Path(run.dir) / run.name
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already. Remove it, or import under another run.name.")
    model = config_from_hf(_read_json(source / "config.json"))
    tokenizer = _read_tokenizer(source, model)
    described = TokenizerConfig(kind="huggingface", path=str(directory / "tokenizer"))
    plain = Config(
        run=run, model=model, data=DataConfig(tokenizer=described), seq_len=min(SEQ_LEN, model.max_seq_len)
    )
    cfg = load(Config, dump(plain))
    cfg = replace(cfg, run=replace(cfg.run, id=new_run_id()))
    partial = directory.parent / f".{directory.name}-{uuid.uuid4().hex[:12]}"
    try:
        (partial / "tensors").mkdir(parents=True)
        with ExitStack() as stack:
            files = _open_all(source, stack)
            tensors = _read_tensors(files, model, partial / "tensors", progress)
        progress("writing the checkpoint", 0.0)
        tokenizer.save(partial / "tokenizer")
        tokenizer.save_pretrained(
            partial / "tokenizer"
        )  # names the end-of-text token for data.tokenizer.path
        state = {"step": 0, "tokens": 0, "watch": {}}
        info = {"run_id": cfg.run.id, "config": dump(cfg), "tokenizer_sha256": tokenizer_digest(partial)}
        Checkpointer(partial / "checkpoints", cfg.checkpoint).save(0, tensors, state, info)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        del tensors
        shutil.rmtree(partial / "tensors")
        write_config(partial, cfg)
        facts = {"source": str(source.resolve()), "model": model.kind, "parameters": parameters}
        (partial / IMPORT_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        RunLog(partial, cfg.run.id).event("import", **facts)
        if directory.exists():
            directory.rmdir()
        os.rename(partial, directory)
    except (OSError, CheckpointSaveError) as error:
        raise UserError(f"{directory} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Imported(cfg, parameters, len(set(files.values())))


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
    checkpointer: Checkpointer, state: TrainState, *, step: int | None = None
) -> VerifiedCheckpoint:
    """Load only the weights of an imported or adopted run into `state`: those of `step`, or the newest.

    Raises:
        UserError: there is no checkpoint, or the model has other tensors.
        DamagedCheckpointError: the checkpoint is damaged.
    """
    weights = {name: tensor for name, tensor in state.tensors().items() if name.startswith(WEIGHTS)}
    found = checkpointer.load(weights, only=WEIGHTS, step=step)
    if found is None:
        raise UserError(f"{checkpointer.directory} has no checkpoint")
    state.take_up(weights)
    if state.average is not None:
        for name, average in state.average.averages.items():
            average.copy_(state.weights.parameters[name].detach())
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path.parent} is not a Hugging Face model directory: {path.name}: {error.strerror}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _read_tokenizer(source: Path, model: ModelConfig) -> HuggingFaceTokenizer:
    tokenizer = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(source)))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding only "
            f"{model.vocab_size} rows"
        )
    return tokenizer


def _open_all(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Open the safetensors files of `source`; return the name of each tensor with the open file that holds it."""
    if (source / INDEX).is_file():
        listed = _read_json(source / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise UserError(f"{source / INDEX} has no weight_map from tensors to file names")
        names = sorted(set(listed.values()))
    else:
        names = sorted(path.name for path in source.glob("*.safetensors"))
    if not names:
        raise UserError(
            f"{source} has no safetensors files. Convert other formats with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    found: dict[str, Any] = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(source / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{source / name} can't be read: {error}") from None
        found |= dict.fromkeys(file.keys(), file)
    return found


def _read_tensors(
    files: Mapping[str, Any], model: ModelConfig, scratch: Path, progress: Callable[[str, float], None]
) -> dict[str, Tensor]:
    """Return the model's tensors by their keys in a checkpoint, each mapped to a file in `scratch`.

    Raises:
        UserError: a tensor is unknown, missing, of another shape, or differs from the one that it repeats.
    """
    spec = get_spec(model.kind)
    mapping = spec.weights(model)
    with torch.device("meta"):
        wanted = spec.build(model).to(torch.float32).state_dict()
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    places = _checked_names(files, mapping, shapes)
    tensors: dict[str, Tensor] = {}
    parts = list(_parts(mapping))
    for done, part in enumerate(parts):
        progress("importing", done / len(parts))
        names = [rule.theirs for rule in part.rules] + [
            name for stack in part.stacks for name in stack.theirs
        ]
        theirs = {name: files[places[name]].get_tensor(places[name]) for name in names}
        for name, tensor in theirs.items():
            if not tensor.is_floating_point() or tensor.itemsize == 1:
                raise UserError(f"{name} is quantized ({tensor.dtype}): import the model in 16 or 32 bits")
        for name, value in part.load(theirs, shapes).items():
            target = _on_disk(scratch / str(len(tensors)), wanted[name])
            tensors[WEIGHTS + name] = target.copy_(value)
    if missing := sorted(set(wanted) - {name.removeprefix(WEIGHTS) for name in tensors}):
        raise UserError(f"a Hugging Face {model.kind} model does not hold: {', '.join(missing[:8])}")
    return tensors


def _checked_names(
    files: Mapping[str, Any], mapping: WeightMap, shapes: Mapping[str, torch.Size]
) -> dict[str, str]:
    """Check names, shapes and repeats without reading more than a repeat; return full name -> name in its file."""
    is_full = any(name.startswith(mapping.prefix) for name in files)
    places = {name if is_full else mapping.prefix + name: name for name in files}
    for repeat, first in mapping.repeats.items():
        if repeat in places and first in places:
            pair = [files[places[name]].get_tensor(places[name]) for name in (repeat, first)]
            if not torch.equal(*pair):
                raise UserError(f"{repeat} differs from {first}, although config.json ties the embeddings")
            del places[repeat]
    hollow = {
        full: torch.empty(files[name].get_slice(name).get_shape(), device="meta")
        for full, name in places.items()
    }
    mapping.load(hollow, shapes)
    return places


def _parts(mapping: WeightMap) -> Iterator[WeightMap]:
    """Yield the map of each rule and each stack alone."""
    alone = replace(mapping, prefix="", repeats={}, constants=NOTHING)
    for rule in mapping.rules:
        yield replace(alone, rules=(rule,), stacks=())
    for stack in mapping.stacks:
        yield replace(alone, rules=(), stacks=(stack,))


def _on_disk(path: Path, like: Tensor) -> Tensor:
    """Create a tensor backed by a new memory-mapped file, so that it can exceed the available memory."""
    flat = torch.from_file(str(path), shared=True, size=math.prod(like.shape), dtype=like.dtype)
    return flat.view(like.shape)
