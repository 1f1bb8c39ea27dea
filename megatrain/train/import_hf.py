"""Import of a Hugging Face directory as a run at step 0, some rows at a time: the full model is never in memory."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatrain.checkpoint.cipher import SUFFIX
from megatrain.checkpoint.reader import TensorSpec
from megatrain.checkpoint.rows import row_pieces
from megatrain.checkpoint.safetensors_file import INDEX_FILE, SafetensorsSource
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.foreign import model_from_hf, weight_map
from megatrain.models.registry import get_spec
from megatrain.models.spec import Rule, Stack, WeightMap
from megatrain.train.config import RunConfig
from megatrain.train.files import IMPORT_FILE
from megatrain.train.imported import (
    Imported,
    Progress,
    Rows,
    free_directory,
    read_model_tokenizer,
    write_run,
)
from megatrain.train.quantized_files import (
    QUANTIZATION,
    Dequantized,
    Source,
    Storage,
    is_quantized,
    read_storage,
)
from megatrain.train.restore import WEIGHTS

NOTHING = r"(?!)"


def import_hf(source: Path, run: RunConfig, *, progress: Progress) -> Imported:
    """Write the model and tokenizer of `source` as a new run, which appears atomically, with a checkpoint of step 0.

    Weights are stored in float32.

    Raises:
        UserError: `source` is not such a directory, its model is not supported, or the run exists.
    """
    free_directory(run)
    model = read_model_config(source)
    tokenizer = read_model_tokenizer(source, model)
    files = open_shards(source)
    tensors = {WEIGHTS + name: pair for name, pair in map_tensors(as_numbers(source, files), model).items()}
    done = write_run(run, model, tokenizer, tensors, _identity(source), progress=progress)
    return replace(done, files=len(files))


def import_once(source: Path, run_dir: str, *, progress: Progress) -> Path:
    """Return the run as which `source` was imported under its own name in `run_dir`; import it if it was not.

    Raises:
        UserError: it can't be imported, or has changed since, or the name is another run's.
    """
    run = RunConfig(
        name=re.sub(r"[^A-Za-z0-9._=,-]+", "-", source.absolute().name).lstrip("._=,-"), dir=run_dir
    )
    target = Path(run.dir) / run.name
    if not (target / IMPORT_FILE).is_file():
        import_hf(source, run, progress=progress)
        return target
    known, now = _read_json(target / IMPORT_FILE), _identity(source)
    if any(known.get(key) != value for key, value in now.items()):
        raise UserError(
            f"{target} was imported from {known.get('source')}, as it was then, and not from {source} as it is now. "
            f"Remove it, or import under another name (megatrain import {source} run.name=NAME) and start there."
        )
    return target


def _identity(source: Path) -> dict[str, object]:
    """Return what tells whether a Hugging Face directory is still the same: place, and sizes and times of files."""
    files = sorted(path for path in source.iterdir() if path.suffix in (".json", ".safetensors"))
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"source": str(source.resolve()), "files": stamps}


def read_model_config(directory: Path) -> ModelConfig:
    """Return the model that `config.json` describes; how its weights are quantized, `as_numbers` reads.

    Raises:
        UserError: there is none, or it is not supported.
    """
    found = _read_json(directory / "config.json")
    if is_quantized(found):
        del found[QUANTIZATION]
    return model_from_hf(found)


def read_end_tokens(directory: Path) -> frozenset[int]:
    """Return the tokens at which a Hugging Face model ends its text: those of its configs (`eos_token_id`).

    Raises:
        UserError: a file is damaged.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            named = _read_json(directory / name).get("eos_token_id")
            found.update(
                each for each in (named if isinstance(named, list) else [named]) if type(each) is int
            )
    return frozenset(found)


def as_numbers(directory: Path, files: list[SafetensorsSource]) -> Source:
    """Return the tensors of `files`, the safetensors files of `directory`, with quantized weights as numbers.

    Raises:
        UserError: they are quantized in a way that is not supported.
    """
    storage = storage_of(directory)
    return Shards(files) if storage is None else Dequantized(Shards(files), storage)


def storage_of(directory: Path) -> Storage | None:
    """Return how the weights of a Hugging Face directory are quantized; None if they are not.

    Raises:
        UserError: in a way that is not supported.
    """
    return read_storage(_read_json(directory / "config.json"))


def weight_specs(model: ModelConfig) -> dict[str, TensorSpec]:
    """Return dtype (float32) and shape of the model's parameters and buffers in a checkpoint."""
    with torch.device("meta"):
        wanted = get_spec(model.kind).build(model).to(torch.float32).state_dict()
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in wanted.items()}


def map_tensors(source: Source, model: ModelConfig) -> dict[str, tuple[TensorSpec, Rows]]:
    """Return the model's tensors by name, each with the function that reads its rows from `source`.

    Raises:
        UserError: a tensor is unknown, missing, of another shape, or differs from the one that it repeats.
    """
    wanted = weight_specs(model)
    shapes = {name: spec.size for name, spec in wanted.items()}
    mapping = weight_map(model)
    places = _checked_names(source, mapping, shapes)
    found: dict[str, Rows] = {}
    for rule in mapping.rules:
        found |= {ours: partial(_rule_rows, source, places, rule, shapes, ours) for ours in rule.ours}
    for stack in mapping.stacks:
        found[stack.ours] = partial(_stack_rows, source, places, stack)
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"a Hugging Face {model.kind} model does not hold: {', '.join(missing[:8])}")
    return {name: (wanted[name], rows) for name, rows in found.items()}


class Shards:
    """Tensors of several safetensors files as those of one."""

    def __init__(self, files: list[SafetensorsSource]) -> None:
        self._files = {name: file for file in files for name in file.specs}
        self.specs = {name: file.specs[name] for name, file in self._files.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop`."""
        return self._files[name].rows(name, start, stop)


def _rule_rows(
    source: Source,
    places: Mapping[str, str],
    rule: Rule,
    shapes: Mapping[str, torch.Size],
    ours: str,
    *rows: int,
) -> Tensor:
    """Return rows of a parameter that a rule of the map yields: read alone, unless its elements are reordered."""
    start, stop = rows
    name = places[rule.theirs]
    if not rule.transpose and rule.pairs is None:
        before = sum(shapes[each][0] for each in rule.ours[: rule.ours.index(ours)])
        return source.rows(name, before + start, before + stop)
    alone = WeightMap(rules=(rule,))
    return alone.load({rule.theirs: _whole(source, name)}, shapes)[ours][start:stop]


def _stack_rows(source: Source, places: Mapping[str, str], stack: Stack, start: int, stop: int) -> Tensor:
    return torch.stack([_whole(source, places[name]) for name in stack.theirs[start:stop]])


def _whole(source: Source, name: str) -> Tensor:
    size = source.specs[name].size
    return source.rows(name, 0, size[0] if size else 0)


def _checked_names(source: Source, mapping: WeightMap, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """Check names, shapes and repeats without reading more than a repeat; return full name -> name in the source."""
    is_full = any(name.startswith(mapping.prefix) for name in source.specs)
    places = {name if is_full else mapping.prefix + name: name for name in source.specs}
    for repeat, first in mapping.repeats.items():
        if repeat in places and first in places:
            if not _are_equal(source, places[repeat], places[first]):
                raise UserError(f"{repeat} differs from {first}, although config.json ties the embeddings")
            del places[repeat]
    hollow = {full: torch.empty(source.specs[name].size, device="meta") for full, name in places.items()}
    mapping.load(hollow, shapes)
    for theirs in [rule.theirs for rule in mapping.rules] + [
        each for s in mapping.stacks for each in s.theirs
    ]:
        dtype = source.specs[places[theirs]].dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise UserError(f"{theirs} is quantized ({dtype}): import the model in 16 or 32 bits")
    return places


def _are_equal(source: Source, a: str, b: str) -> bool:
    if source.specs[a].size != source.specs[b].size:
        return False
    pieces: Iterator[tuple[int, int]] = row_pieces(source.specs[a])
    return all(torch.equal(source.rows(a, *rows), source.rows(b, *rows)) for rows in pieces)


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


def open_shards(source: Path) -> list[SafetensorsSource]:
    """Open the safetensors files of `source`."""
    if (source / INDEX_FILE).is_file():
        listed = _read_json(source / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise UserError(f"{source / INDEX_FILE} has no weight_map from tensors to file names")
        names = sorted(set(listed.values()))
    else:
        names = sorted(path.name for path in source.glob("*.safetensors"))
    if any(not (source / name).exists() and (source / f"{name}{SUFFIX}").exists() for name in names) or (
        not names and any(source.glob(f"*{SUFFIX}"))
    ):
        raise UserError(f"{source} is encrypted. Decrypt it: megatrain checkpoint decrypt {source} DIRECTORY")
    if not names:
        raise UserError(
            f"{source} has no safetensors files. Convert other formats with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    found = []
    for name in names:
        try:
            found.append(SafetensorsSource(source / name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{source / name} can't be read: {error}") from None
    return found
