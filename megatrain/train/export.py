"""Export of a run's model as a Hugging Face directory, tensor by tensor: the full model is never in memory."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatrain.checkpoint.reader import CheckedReader, read_tensors
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.data.tokenizer import HuggingFaceTokenizer
from megatrain.data.tokenizer_files import load_tokenizer
from megatrain.models.registry import get_spec
from megatrain.models.spec import WeightMap
from megatrain.train.files import read_config, require_unchanged
from megatrain.train.restore import AVERAGE, WEIGHTS, takes_average

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Exported:
    step: int
    files: int
    parameters: int


def export(
    run: Path,
    target: Path,
    *,
    dtype: str,
    average: bool | None,
    shard_bytes: int,
    progress: Callable[[str, float], None],
) -> Exported:
    """Write the newest checkpoint's model into the new directory `target`, which appears atomically.

    Args:
        dtype: a key of `DTYPES`. average: export the moving average of the weights; None: if the run keeps one.
        shard_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        UserError: there is no such run or checkpoint, the model has options that the Hugging Face format lacks, or
            `target` exists.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already. Remove it, or export to another directory.")
    cfg = read_config(run)
    prefix = AVERAGE if takes_average(run, cfg, average) else WEIGHTS
    spec = get_spec(cfg.model.kind)
    mapping, config = spec.weights(cfg.model), spec.hf_config(cfg.model)
    checkpointer = Checkpointer(run / "checkpoints", cfg.checkpoint, moves_damaged=False)
    found = checkpointer.latest()
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    require_unchanged(run, cfg, found.manifest.info, found.path)
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        tokenizer = _write_tokenizer(run / "tokenizer", partial)
        _write_json(partial / CONFIG, config | tokenizer | {"dtype": HF_DTYPES[dtype]})
        pieces = _pieces(mapping, checkpointer.open(found.step), prefix)
        total = len(mapping.rules) + len(mapping.stacks)
        counted = _counting(pieces, total, progress)
        files, parameters = _write_shards(partial, counted, DTYPES[dtype], shard_bytes)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(found.step, files, parameters)


def _pieces(mapping: WeightMap, reader: CheckedReader, prefix: str) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each rule of `mapping` in turn, under Hugging Face's names."""
    parts = [replace(mapping, rules=(rule,), stacks=()) for rule in mapping.rules]
    parts += [replace(mapping, rules=(), stacks=(stack,)) for stack in mapping.stacks]
    specs = reader.tensor_specs()
    for part in parts:
        names = [name for rule in part.rules for name in rule.ours] + [stack.ours for stack in part.stacks]
        ours = {}
        for name in names:
            key = prefix + name if prefix + name in specs else WEIGHTS + name  # buffers have no average
            ours[key] = torch.empty(specs[key].size, dtype=specs[key].dtype)
        read_tensors(reader, ours)
        yield part.export(dict(zip(names, ours.values(), strict=True)))


def _counting(
    pieces: Iterator[dict[str, Tensor]], total: int, progress: Callable[[str, float], None]
) -> Iterator[dict[str, Tensor]]:
    for done, piece in enumerate(pieces):
        progress("exporting", done / total)
        yield piece


def _write_shards(
    directory: Path, pieces: Iterator[dict[str, Tensor]], dtype: torch.dtype, shard_bytes: int
) -> tuple[int, int]:
    """Write files of about `shard_bytes`, and an index of several; return the numbers of files and parameters."""
    shard: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    files, size, parameters, total = 0, 0, 0, 0
    for piece in pieces:
        for name, tensor in piece.items():
            converted = tensor.to(dtype).contiguous()
            if shard and size + converted.nbytes > shard_bytes:
                _save(directory, files, shard)
                shard, size, files = {}, 0, files + 1
            shard[name], places[name] = converted, files
            size, total = size + converted.nbytes, total + converted.nbytes
            parameters += converted.numel()
    _save(directory, files, shard)
    files += 1
    names = [
        f"model-{n + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        for n in range(files)
    ]
    for number, name in enumerate(names):
        os.rename(directory / _unnamed(number), directory / name)
    if files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: names[n] for k, n in places.items()}}
        _write_json(directory / "model.safetensors.index.json", index)
    return files, parameters


def _unnamed(number: int) -> str:
    """Return the temporary name of a file; the final name contains the number of files."""
    return f"part-{number}"


def _save(directory: Path, number: int, shard: dict[str, Tensor]) -> None:
    save_file(shard, directory / _unnamed(number), metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG, directory / _unnamed(number))  # safetensors: for the owner alone


def _write_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Write the tokenizer if Hugging Face has a format for it; return its entries in config.json."""
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save_pretrained(target)
    return {"eos_token_id": tokenizer.eos_id}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
