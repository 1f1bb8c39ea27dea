"""Adapters out of a checkpoint: added to their weights, or alone in the format of the package peft.

Where Hugging Face fuses several products into one (GPT-2's queries, keys and values), peft has one adapter for it: of
their ranks together, with the up projections as blocks on a diagonal. That is the same function.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.cipher import FileCipher
from megatrain.checkpoint.reader import CheckedReader, TensorSpec, read_tensors
from megatrain.checkpoint.safetensors_file import SafetensorsFile
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import UserError
from megatrain.models.foreign import weight_map
from megatrain.models.registry import get_spec
from megatrain.models.spec import Rule, WeightMap
from megatrain.nn.contract import CLASSIFIER
from megatrain.parallel.lora import DOWN, UP
from megatrain.parallel.lora_config import LoRAConfig
from megatrain.train.adopt import adopted, require_same_base
from megatrain.train.config import Config
from megatrain.train.files import IMPORT_FILE, require_unchanged
from megatrain.train.hf_files import Exported, new_directory, write_json, write_tokenizer

ADAPTER_FILE = "adapter_model.safetensors"
NO_TENSOR = "\0"
"""Beginning of no tensor's name."""
PREFIX = "base_model.model."
"""What peft puts before the names of the base model's modules."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapter of one weight: `down` `(rank, in)`, `up` `(out, rank)`."""

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """Return what the adapter adds to its weight, `(out, in)`."""
        return self.up @ self.down * self.scale


def read_adapters(reader: CheckedReader, prefix: str, cfg: LoRAConfig) -> dict[str, Adapters]:
    """Return the adapters in a checkpoint, by the names of the weights that they are added to.

    Args:
        prefix: of their names in the checkpoint: that of weights, or of averages.
    """
    ends = tuple(f".{part}.weight" for part in (DOWN, UP))
    specs = {name: spec for name, spec in reader.tensor_specs().items() if name.startswith(prefix)}
    found = {
        name: torch.empty(spec.size, dtype=spec.dtype) for name, spec in specs.items() if name.endswith(ends)
    }
    read_tensors(reader, found)
    layers = [name.removesuffix(ends[0]) for name in found if name.endswith(ends[0])]
    return {
        f"{layer.removeprefix(prefix)}.weight": Adapters(
            found[layer + ends[0]], found[layer + ends[1]], cfg.alpha / cfg.rank
        )
        for layer in layers
    }


def open_base(cfg: Config, found: VerifiedCheckpoint) -> CheckedReader:
    """Return a reader of the weights that the adapters in the checkpoint `found` were trained beside.

    Raises:
        UserError: they are gone, or were changed.
    """
    base, step = adopted(cfg)
    verified = base.load({}, only=NO_TENSOR, step=step)  # hashes every file
    require_same_base(found.manifest.info, verified, found.path)
    assert verified is not None
    return base.open(verified.step)


def export_adapters(
    run: Path, target: Path, cfg: Config, *, prefix: str, dtype: torch.dtype, cipher: FileCipher | None = None
) -> Exported:
    """Write the adapters of the newest checkpoint of `run` into the new directory `target`, as peft does.

    Raises:
        UserError: there is no checkpoint, or `target` can't be written.
    """
    mapping = weight_map(cfg.model)
    checkpointer = Checkpointer(run / "checkpoints", cfg.checkpoint, moves_damaged=False)
    found = checkpointer.latest()
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    require_unchanged(run, cfg, found.manifest.info, found.path)
    reader = checkpointer.open(found.step)
    adapters = read_adapters(reader, prefix, cfg.lora)
    shapes = get_spec(cfg.model.kind).plan(cfg.model).shapes
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for rule in mapping.rules:
        if any(name in adapters for name in rule.ours):
            module = rule.theirs.removesuffix(".weight")
            down, up = _fused(rule, adapters, shapes)
            ranks[".".join(module.split(".")[-2:])] = len(down)
            tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    if cfg.model.classifier is not None:  # trained in full beside them
        key = f"{prefix}{CLASSIFIER}.weight"
        head = torch.empty(reader.tensor_specs()[key].size, dtype=reader.tensor_specs()[key].dtype)
        read_tensors(reader, {key: head})
        tensors[f"{PREFIX}score.weight"] = head
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    fans = {rule.transpose for rule in mapping.rules if any(name in adapters for name in rule.ours)}
    with new_directory(target) as partial:
        write_tokenizer(run / "tokenizer", partial)
        write_json(partial / "adapter_config.json", _config(cfg, ranks, transposed=fans == {True}))
        specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        with SafetensorsFile(partial / ADAPTER_FILE, specs, {"format": "pt"}, cipher) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)
    return Exported(found.step, 1, sum(tensor.numel() for tensor in tensors.values()))


def _fused(
    rule: Rule, adapters: Mapping[str, Adapters], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B of one Hugging Face module, which may hold several of ours."""
    given = [(name, adapters[name]) for name in rule.ours if name in adapters]
    total = sum(len(each.down) for _, each in given)
    rows = {name: given[0][1].up.new_zeros(shapes[name][0], total) for name in rule.ours}
    begin = 0
    for name, each in given:
        rows[name][:, begin : begin + len(each.down)] = each.up
        begin += len(each.down)
    alone = WeightMap(rules=(replace(rule, transpose=False),))
    return torch.cat([each.down for _, each in given]), alone.export(rows)[rule.theirs]


def _config(cfg: Config, ranks: dict[str, int], *, transposed: bool) -> dict[str, Any]:
    """Return adapter_config.json; `ranks` are those of the modules, by the ends of their names."""
    scale = cfg.lora.alpha / cfg.lora.rank
    others = {name: rank for name, rank in ranks.items() if rank != cfg.lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if cfg.model.classifier is None else "SEQ_CLS",
        "modules_to_save": None if cfg.model.classifier is None else ["score"],
        "base_model_name_or_path": _base_name(cfg),
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: rank * scale for name, rank in others.items()},
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _base_name(cfg: Config) -> str:
    """Return the Hugging Face directory that the base was imported from, or the base's checkpoint."""
    path = Path(str(cfg.checkpoint.adopt))
    imported = path.parent.parent / IMPORT_FILE
    if not imported.is_file():
        return str(path)
    return str(json.loads(imported.read_text(encoding="utf-8")).get("source", path))
