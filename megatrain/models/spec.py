"""The interface of a model family, and the map between MegaTrain's parameter names and Hugging Face's."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatrain.config.errors import UserError
from megatrain.nn.config import DecoderConfig
from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Rule:
    """One Hugging Face tensor and the MegaTrain parameters that it contains.

    Several parameters are concatenated along their output dimension (rows); `transpose` is for layers that store their
    weights as `(in, out)`. `pairs` (head, rotary): of every `head` rows the last `rotary` are rotated in pairs; the two
    rows of a pair are adjacent at Hugging Face, and `rotary / 2` rows apart in MegaTrain.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    pairs: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """One MegaTrain parameter that stacks several Hugging Face tensors along a new first dimension."""

    theirs: tuple[str, ...]
    ours: str


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Conversion of weights in both directions; unknown and missing tensors are errors that name them."""

    rules: tuple[Rule, ...]
    stacks: tuple[Stack, ...] = ()
    prefix: str = ""
    """Prefix of all names that is absent from files saved from a model without its head."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a file may repeat (a tied head): name -> name of the original, which it must equal."""
    constants: str = r"(?!)"
    """Pattern of names to ignore: buffers in old files that follow from the config, and parts of a model that MegaTrain
    does not have."""

    def export(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return MegaTrain's tensors under Hugging Face's names (views unless concatenated).

        Raises:
            UserError: a tensor is unknown or missing.
        """
        wanted = [name for rule in self.rules for name in rule.ours]
        _check_names(ours, wanted + [stack.ours for stack in self.stacks])
        theirs: dict[str, Tensor] = {}
        for rule in self.rules:
            parts = [ours[name] for name in rule.ours]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            if rule.pairs is not None:
                joined = _swap_rotary(joined, *rule.pairs, halves=True)
            theirs[rule.theirs] = joined.T if rule.transpose else joined
        for stack in self.stacks:
            theirs |= zip(stack.theirs, ours[stack.ours], strict=True)
        return theirs

    def load(self, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return Hugging Face's tensors under MegaTrain's names (views unless stacked), for parameters of `shapes`.

        Raises:
            UserError: a tensor is unknown, missing, of another shape, or differs from the one that it repeats.
        """
        theirs = self._without_extras(theirs)
        stacked = [name for stack in self.stacks for name in stack.theirs]
        _check_names(theirs, stacked + [rule.theirs for rule in self.rules])
        ours: dict[str, Tensor] = {}
        for rule in self.rules:
            tensor = theirs[rule.theirs].T if rule.transpose else theirs[rule.theirs]
            wanted = [shapes[name] for name in rule.ours]
            rows = sum(shape[0] for shape in wanted)
            _check_shape(rule.theirs, tensor, (rows, *wanted[0][1:]), " + ".join(rule.ours), rule.transpose)
            if rule.pairs is not None:
                tensor = _swap_rotary(tensor, *rule.pairs, halves=False)
            ours |= zip(rule.ours, tensor.split([shape[0] for shape in wanted]), strict=True)
        for stack in self.stacks:
            for name in stack.theirs:
                _check_shape(name, theirs[name], shapes[stack.ours][1:], stack.ours, False)
            ours[stack.ours] = torch.stack([theirs[name] for name in stack.theirs])
        return ours

    def _without_extras(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `theirs` with full names, without constants and repeats."""
        if not any(name.startswith(self.prefix) for name in theirs):
            theirs = {self.prefix + name: tensor for name, tensor in theirs.items()}
        kept = {name: tensor for name, tensor in theirs.items() if not re.fullmatch(self.constants, name)}
        for repeat, first in self.repeats.items():
            if repeat in kept and first in kept and not torch.equal(kept.pop(repeat), kept[first]):
                raise UserError(f"{repeat} differs from {first}: set model.tie_embeddings=false to keep both")
        return kept


def _swap_rotary(tensor: Tensor, head: int, rotary: int, *, halves: bool) -> Tensor:
    """Reorder rotary rows from halves to adjacent pairs or back (see `Rule`); tensor `(rows, ...)`."""
    heads = tensor.unflatten(0, (-1, head))
    kept, turned = heads.split([head - rotary, rotary], 1)
    sizes = (2, rotary // 2) if halves else (rotary // 2, 2)
    return torch.cat([kept, turned.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)], 1).flatten(0, 1)


def _check_shape(name: str, tensor: Tensor, need: Sequence[int], ours: str, transposed: bool) -> None:
    if tensor.shape != tuple(need):
        said = f"{tuple(tensor.shape)}{' (transposed)' if transposed else ''}"
        raise UserError(
            f"{name} has the shape {said}, but {ours} needs {tuple(need)}: the weights do not match the config"
        )


def _check_names(given: Iterable[str], wanted: Iterable[str]) -> None:
    have, need = set(given), set(wanted)
    problems = [f"missing: {name}" for name in sorted(need - have)]
    problems += [f"unknown: {name}" for name in sorted(have - need)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError("the tensors do not match the model: " + "; ".join(problems[:8]) + more)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model family. Every function but the last takes the family's config."""

    kind: str
    hf_type: str
    """Hugging Face's model_type."""
    build: Callable[[Any], Decoder]
    """Builds the model on the default device (which may be meta)."""
    plan: Callable[[Any], Plan]
    """Returns the shapes and roles of the model's weights, from its config alone."""
    weights: Callable[[Any], WeightMap]
    """Raises UserError, naming the option, for a config that the Hugging Face format cannot express."""
    hf_config: Callable[[Any], dict[str, Any]]
    """Returns the content of config.json, without the ids of special tokens."""
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    """Returns the family's config from the content of config.json; raises UserError, naming the key, if unsupported."""


def require(cfg: Any, family: str, *, prefix: str = "model.", **options: object) -> None:
    """Refuse options whose values `family`'s Hugging Face format does not have, naming them with `prefix`."""
    wrong = {key: getattr(cfg, key) for key, value in options.items() if getattr(cfg, key) != value}
    if wrong:
        said = ", ".join(f"{prefix}{key}={value} (must be {options[key]})" for key, value in wrong.items())
        raise UserError(f"a Hugging Face {family} model cannot express: {said}")


SIZES = frozenset({"n_layers", "hidden_size", "n_heads", "ffn_size", "vocab_size", "max_seq_len", "norm_eps"})
TRAINING_ONLY = frozenset({"kind", "init_std", "init_scaling"})


def require_decoder(cfg: DecoderConfig, family: str, *, expresses: Iterable[str], **fixed: object) -> None:
    """Refuse, by name, the options of a decoder that `family`'s Hugging Face format cannot express.

    Every option must have `DecoderConfig`'s default, so that an option added later is refused until a family says
    otherwise: by naming it in `expresses`, or in `fixed` with the value that the family always has.
    """
    free = {*expresses, *SIZES, *TRAINING_ONLY}
    defaults = {
        field.name: field.default for field in dataclasses.fields(DecoderConfig) if field.name not in free
    }
    require(cfg, family, prefix="model.", **(defaults | fixed))


def require_part(cfg: Any, family: str, name: str) -> Any:
    """Return the part `name` of a model's config, which `family`'s Hugging Face format always has."""
    part = getattr(cfg, name)
    if part is None:
        raise UserError(f"a Hugging Face {family} model cannot express: model.{name}=null")
    return part


def require_hf(hf: Mapping[str, Any], **keys: object) -> None:
    """Refuse, by name, values in a config.json that MegaTrain's models do not support; absent keys are legal."""
    wrong = {key: hf[key] for key, value in keys.items() if hf.get(key, value) != value}
    if wrong:
        said = ", ".join(f"{key}={value} (must be {keys[key]})" for key, value in wrong.items())
        raise UserError(f"config.json describes a {hf['model_type']} model that is not supported: {said}")


def value_of(hf: Mapping[str, Any], key: str) -> Any:
    """Return a required key of config.json.

    Raises:
        UserError: config.json does not have it.
    """
    if key not in hf:
        raise UserError(f"config.json has no {key}")
    return hf[key]
