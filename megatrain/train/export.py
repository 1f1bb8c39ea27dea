"""Export of a run's model as a Hugging Face directory, tensor by tensor: the full model is never in memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.decrypt import export_cipher
from megatrain.checkpoint.reader import CheckedReader, TensorSpec, read_tensors
from megatrain.checkpoint.rows import read_pieces
from megatrain.checkpoint.safetensors_file import write_shards
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError
from megatrain.models.foreign import hf_config, weight_map
from megatrain.models.spec import WeightMap
from megatrain.nn.contract import CLASSIFIER
from megatrain.parallel.packed_base import rounded
from megatrain.train.files import read_config, require_unchanged
from megatrain.train.hf_files import Exported, new_directory, require_new, write_json, write_tokenizer
from megatrain.train.peft import Adapters, export_adapters, open_base, read_adapters
from megatrain.train.restore import AVERAGE, WEIGHTS, takes_average

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(
    run: Path,
    target: Path,
    *,
    dtype: str,
    average: bool | None,
    shard_bytes: int,
    progress: Callable[[str, float], None],
    merge: bool = False,
    encrypt: bool = False,
) -> Exported:
    """Write the newest checkpoint's model into the new directory `target`, which appears atomically.

    Args:
        dtype: a key of `DTYPES`. average: export the moving average of the weights; None: if the run keeps one.
        shard_bytes: maximum size of a file, unless a single tensor is larger.
        merge: of a run of adapters, write the model with them added; else they are written alone, in PEFT's format.
        encrypt: encrypt the files of weights as they are written, with the key of the environment.

    Raises:
        UserError: there is no such run or checkpoint, the model has options that the Hugging Face format lacks, or
            `target` exists.
    """
    require_new(target)
    cipher = export_cipher() if encrypt else None
    cfg = read_config(run)
    prefix = AVERAGE if takes_average(run, cfg, average) else WEIGHTS
    if cfg.lora.rank and not merge:
        return export_adapters(run, target, cfg, prefix=prefix, dtype=DTYPES[dtype], cipher=cipher)
    mapping, config = weight_map(cfg.model), hf_config(cfg.model)
    checkpointer = Checkpointer(run / "checkpoints", cfg.checkpoint, moves_damaged=False)
    found = checkpointer.latest()
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    require_unchanged(run, cfg, found.manifest.info, found.path)
    with new_directory(target) as partial:
        tokenizer = write_tokenizer(run / "tokenizer", partial)
        write_json(partial / CONFIG, config | tokenizer | {"dtype": HF_DTYPES[dtype]})
        own = source = _Source(checkpointer.open(found.step), prefix, DTYPES[dtype])
        if cfg.lora.rank:
            adapters = read_adapters(source.reader, prefix, cfg.lora)
            group = 0 if cfg.lora.base == "full" else cfg.lora.base_group
            source = _Source(open_base(cfg, found), WEIGHTS, DTYPES[dtype], adapters, group)
        parts = [replace(mapping, rules=(rule,), stacks=()) for rule in mapping.rules]
        parts += [replace(mapping, rules=(), stacks=(stack,)) for stack in mapping.stacks]
        # A classifier's head is trained beside adapters, and not in what they were trained on.
        pairs = [(own if _is_of_head(part) else source, part) for part in parts]
        specs = {name: spec for each, part in pairs for name, spec in each.outline(part).items()}
        tensors = _tensors(pairs, progress)
        files = write_shards(
            partial, specs, tensors, shard_bytes=shard_bytes, metadata={"format": "pt"}, cipher=cipher
        )
    return Exported(found.step, files, sum(spec.size.numel() for spec in specs.values()))


@dataclass(frozen=True)
class _Source:
    """The tensors of a checkpoint in the dtype of an export; `prefix` chooses weights or averages."""

    reader: CheckedReader
    prefix: str
    dtype: torch.dtype
    adapters: Mapping[str, Adapters] = field(default_factory=dict)
    """Adapters to add, by the name of the weight."""
    group: int = 0
    """Inputs that share a scale where the weights beside adapters are of four bits; 0: they are not."""

    def outline(self, part: WeightMap) -> dict[str, TensorSpec]:
        """Return what `read` will return for a part of the map, without reading it."""
        stored = self._stored(part)
        hollow = {name: torch.empty(spec.size, device="meta") for name, (_, spec) in stored.items()}
        return {name: TensorSpec(self.dtype, tensor.shape) for name, tensor in part.export(hollow).items()}

    def read(self, part: WeightMap) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a part of the map under Hugging Face's names, in the checkpoint's dtype.

        One whose elements keep their order comes by rows, as many at a time as are stored together.
        """
        stored = self._stored(part)
        if part.stacks:
            (stack,), ((key, _),) = part.stacks, stored.values()
            matrices = (each for rows in read_pieces(self.reader, key) for each in rows)
            yield from zip(stack.theirs, matrices, strict=True)
            return
        (rule,) = part.rules
        adapted = [name for name in stored if name in self.adapters]
        if len(rule.ours) == 1 and not rule.transpose and rule.pairs is None and not adapted:
            ((key, _),) = stored.values()
            yield from ((rule.theirs, rows) for rows in read_pieces(self.reader, key))
            return
        ours = {key: torch.empty(spec.size, dtype=spec.dtype) for key, spec in stored.values()}
        read_tensors(self.reader, ours)
        for name in adapted:
            weight = ours[stored[name][0]]
            if self.group:
                weight.copy_(rounded(weight, self.group))
            weight += self.adapters[name].product()
        yield from part.export({name: ours[key] for name, (key, _) in stored.items()}).items()

    def _stored(self, part: WeightMap) -> dict[str, tuple[str, TensorSpec]]:
        """Return the parameters of a part of the map, each with its key in the checkpoint."""
        specs = self.reader.tensor_specs()
        found = {}
        for name in [name for rule in part.rules for name in rule.ours] + [each.ours for each in part.stacks]:
            key = (
                self.prefix + name if self.prefix + name in specs else WEIGHTS + name
            )  # buffers have no average
            found[name] = (key, specs[key])
        return found


def _is_of_head(part: WeightMap) -> bool:
    return any(rule.ours == (f"{CLASSIFIER}.weight",) for rule in part.rules)


def _tensors(
    pairs: list[tuple[_Source, WeightMap]], progress: Callable[[str, float], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in turn, or its rows; no more than one part of the map is in memory."""
    for done, (source, part) in enumerate(pairs):
        progress("exporting", done / len(pairs))
        for name, tensor in source.read(part):
            yield name, tensor.to(source.dtype)
