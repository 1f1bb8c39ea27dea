"""Import of a distributed checkpoint of Megatron-LM (Megatron Core, format `torch_dist`) as a run at step 0.

Megatron stores whole tensors in torch.distributed.checkpoint's files, whatever its parallel layout was. The layers of
one kind are stacked into one tensor, or stand alone. Only tensors are read: neither `common.pt` nor any other pickle is
opened, but for the table of tensors, of which nothing but plain values is accepted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.foreign import open_foreign
from megatrain.checkpoint.reader import CheckedReader, TensorSpec
from megatrain.checkpoint.rows import read_box
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.train.config import RunConfig
from megatrain.train.import_hf import read_model_config, weight_specs
from megatrain.train.imported import Imported, Progress, Rows, free_directory, read_model_tokenizer, write_run
from megatrain.train.restore import WEIGHTS

LATEST = "latest_checkpointed_iteration.txt"
"""File beside the iterations' directories that names the newest."""
ATTENTION, MLP = "self_attention", "mlp"
LAYER_NAMES = {
    "attn_norm.weight": (f"{ATTENTION}.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "attn_norm.bias": (f"{ATTENTION}.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
    "attn.q_norm.weight": (f"{ATTENTION}.q_layernorm.weight",),
    "attn.k_norm.weight": (f"{ATTENTION}.k_layernorm.weight",),
    "attn.wo.weight": (f"{ATTENTION}.linear_proj.weight",),
    "attn.wo.bias": (f"{ATTENTION}.linear_proj.bias",),
    "mlp_norm.weight": (f"{MLP}.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "mlp_norm.bias": (f"{MLP}.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
    "mlp.down.weight": (f"{MLP}.linear_fc2.weight",),
    "mlp.down.bias": (f"{MLP}.linear_fc2.bias",),
    "moe.router.weight": (f"{MLP}.router.weight",),
}
"""Parameter of a layer -> the names that Megatron may give it, of which one is there."""
TOP_NAMES = {
    "embed.weight": "embedding.word_embeddings.weight",
    "pos_embed.weight": "embedding.position_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "norm.bias": "decoder.final_layernorm.bias",
    "head.weight": "output_layer.weight",
}
PADDED = ("embed.weight", "head.weight", "pos_embed.weight")
"""Parameters with further rows in Megatron, which pads the vocabulary."""


def find_megatron(directory: Path) -> Path | None:
    """Return the directory of the distributed checkpoint at `directory`, or the newest one; None if there is none."""
    if (directory / ".metadata").is_file() and (directory / "common.pt").is_file():
        return directory
    if (directory / LATEST).is_file():
        word = (directory / LATEST).read_text().strip()
        named = directory / (word if not word.isdigit() else f"iter_{int(word):07d}")
        if (named / ".metadata").is_file():
            return named
    return None


def import_megatron(source: Path, like: Path, run: RunConfig, *, progress: Progress) -> Imported:
    """Write the model of a distributed checkpoint as a new run, with a checkpoint of step 0 in float32.

    Args:
        like: Hugging Face directory of the same architecture, with config.json and the tokenizer; it needs no weights.

    Raises:
        UserError: the checkpoint is damaged or of another model, or the run exists.
    """
    free_directory(run)
    model = read_model_config(like)
    tokenizer = read_model_tokenizer(like, model)
    reader = open_foreign(source)
    tensors = {WEIGHTS + name: pair for name, pair in _Megatron(reader, model).map_tensors().items()}
    facts: dict[str, object] = {"source": str(source.resolve()), "format": "megatron torch_dist"}
    done = write_run(run, model, tokenizer, tensors, facts, progress=progress)
    return replace(done, files=len({place.relative_path for place in reader.checked.storage_data.values()}))


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of one layer, or of the model, in Megatron's checkpoint."""

    key: str
    index: tuple[int, ...]
    """Layer (and expert) in a stacked tensor; empty if it stands alone."""
    size: torch.Size
    """Shape of this layer's part."""


class _Megatron:
    """Megatron's tensors under the names of our parameters."""

    def __init__(self, reader: CheckedReader, model: ModelConfig) -> None:
        self.reader = reader
        self.model = model
        self.specs = reader.tensor_specs()
        self.wanted = weight_specs(model)
        self.used: set[str] = set()

    def map_tensors(self) -> dict[str, tuple[TensorSpec, Rows]]:
        """Return each parameter with the function that reads its rows.

        Raises:
            UserError: a tensor is missing, of another shape, or belongs to no parameter.
        """
        if self.model.kind not in ("gpt2", "llama3", "qwen3"):
            raise UserError(
                f"a Megatron checkpoint of the family {self.model.kind} can't be read; gpt2, llama3 or qwen3 can"
            )
        found = {name: (spec, self._rows(name, spec)) for name, spec in self.wanted.items()}
        ours = [name for name in self.specs if name.startswith(("decoder.", "embedding.", "output_layer."))]
        if unknown := sorted(set(ours) - self.used):
            raise UserError(
                f"the checkpoint has tensors that the model of config.json lacks: {', '.join(unknown[:8])}"
            )
        return found

    def _rows(self, name: str, spec: TensorSpec) -> Rows:
        if name in TOP_NAMES:
            place = self._find(name, None, (TOP_NAMES[name],))
            rows = place.size[0]
            if place.size[1:] != spec.size[1:] or (
                rows != spec.size[0] and not (name in PADDED and rows > spec.size[0])
            ):
                raise self._mismatch(place, name, spec)
            return partial(self._read, place)
        layer_text, _, part = name.removeprefix("layers.").partition(".")
        layer = int(layer_text)
        module, _, kind = part.rpartition(".")
        if module in ("attn.wq", "attn.wk", "attn.wv"):
            return self._attention_rows(name, layer, module[-1], kind)
        if module in ("mlp.gate", "mlp.up"):
            return self._gated_rows(name, layer, module, kind)
        if part not in LAYER_NAMES:
            raise UserError(f"a Megatron checkpoint has no {name}")
        place = self._find(name, layer, LAYER_NAMES[part])
        if place.size != spec.size:
            raise self._mismatch(place, name, spec)
        return partial(self._read, place)

    def _attention_rows(self, name: str, layer: int, which: str, kind: str) -> Rows:
        """Return the reader of queries, keys or values, which Megatron interleaves by group of heads.

        The fused projection has, for each key-value head, the rows of its queries, of its key and of its value.
        """
        place = self._find(name, layer, (f"{ATTENTION}.linear_qkv.{kind}",))
        groups, width = self.model.kv_heads, self.model.qk_head_dim
        queries = self.model.n_heads // groups
        if place.size[0] != groups * (queries + 2) * width or place.size[1:] != self.wanted[name].size[1:]:
            raise self._mismatch(place, name, self.wanted[name])
        first, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[which]

        def rows(start: int, stop: int) -> Tensor:
            fused = self._read(place, 0, place.size[0]).unflatten(0, (groups, queries + 2, width))
            return fused[:, first : first + count].flatten(0, 2)[start:stop]

        return rows

    def _gated_rows(self, name: str, layer: int, module: str, kind: str) -> Rows:
        """Return the reader of the first projection: the gate's rows come before the others, where there is a gate."""
        place = self._find(name, layer, (f"{MLP}.linear_fc1.{kind}",))
        size = self.wanted[name].size
        has_gate = f"layers.{layer}.mlp.gate.weight" in self.wanted
        before = size[0] if has_gate and module == "mlp.up" else 0
        if place.size[0] != size[0] * (1 + has_gate) or place.size[1:] != size[1:]:
            raise self._mismatch(place, name, self.wanted[name])
        return lambda start, stop: self._read(place, before + start, before + stop)

    def _find(self, name: str, layer: int | None, candidates: tuple[str, ...]) -> _Place:
        """Return where a parameter is, by the first of the names that Megatron may give it.

        Raises:
            UserError: there is none of them.
        """
        keys = list(_keys(layer, candidates))
        for key, stacked in keys:
            if key in self.specs:
                self.used.add(key)
                size = self.specs[key].size
                if not stacked:
                    return _Place(key, (), size)
                if size[0] != self.model.n_layers:
                    raise UserError(f"{key} stacks {size[0]} layers, but the model has {self.model.n_layers}")
                return _Place(key, (int(layer or 0),), size[1:])
        raise UserError(
            f"the checkpoint has no tensor for {name}: none of {', '.join(key for key, _ in keys)}"
        )

    def _read(self, place: _Place, start: int, stop: int) -> Tensor:
        """Return rows of a layer's part of a tensor."""
        offsets = (*place.index, start, *(0 for _ in place.size[1:]))
        sizes = (*(1 for _ in place.index), stop - start, *place.size[1:])
        found = read_box(self.reader, place.key, self.specs[place.key], offsets, sizes)
        return found.reshape(stop - start, *place.size[1:])

    def _mismatch(self, place: _Place, name: str, spec: TensorSpec) -> UserError:
        return UserError(
            f"{place.key} has the shape {tuple(place.size)} in a layer, which does not fit {name} {tuple(spec.size)}: "
            "config.json describes another model"
        )


def _keys(layer: int | None, candidates: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yield the keys of a parameter, and whether each has all layers in one tensor."""
    for name in candidates:
        if layer is None:
            yield name, False
        else:
            yield f"decoder.layers.{layer}.{name}", False
            yield f"decoder.layers.{name}", True
