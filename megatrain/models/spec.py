"""What a model family provides, and the map between our parameter names and Hugging Face's."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatrain.config.errors import UserError
from megatrain.nn.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """One Hugging Face tensor and the parameters of ours that it holds.

    Several parameters are joined along their output dimension (rows); `transpose` is for layers that keep their
    weights as `(in, out)`.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Both directions, exactly: an unknown or a missing tensor is an error that names it."""

    rules: tuple[Rule, ...]
    prefix: str = ""
    """What files saved from a model without its head leave off all names."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a file may hold a second time (a tied head): name -> name of the first, which it must equal."""
    constants: str = r"(?!)"
    """Pattern of names of tables that old files hold although they follow from the config; they are passed over."""

    def export(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under Hugging Face's names (views where nothing is joined).

        Raises:
            UserError: a tensor is unknown or missing.
        """
        _check_names(ours, (name for rule in self.rules for name in rule.ours))
        theirs: dict[str, Tensor] = {}
        for rule in self.rules:
            parts = [ours[name] for name in rule.ours]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            theirs[rule.theirs] = joined.T if rule.transpose else joined
        return theirs

    def load(self, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Hugging Face's tensors under our names (views); `shapes` are our parameters' shapes.

        Raises:
            UserError: a tensor is unknown, missing, of another shape, or differs from the one it should repeat.
        """
        theirs = self._without_extras(theirs)
        _check_names(theirs, (rule.theirs for rule in self.rules))
        ours: dict[str, Tensor] = {}
        for rule in self.rules:
            tensor = theirs[rule.theirs].T if rule.transpose else theirs[rule.theirs]
            wanted = [shapes[name] for name in rule.ours]
            rows = sum(shape[0] for shape in wanted)
            if tensor.shape != (rows, *wanted[0][1:]):
                said = f"{tuple(tensor.shape)}{' (transposed)' if rule.transpose else ''}"
                need = f"{' + '.join(rule.ours)} need {(rows, *wanted[0][1:])}"
                raise UserError(
                    f"{rule.theirs} has the shape {said}, but {need}: weights and config do not belong together"
                )
            ours |= zip(rule.ours, tensor.split([shape[0] for shape in wanted]), strict=True)
        return ours

    def _without_extras(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`theirs` with full names, without constants and repeats."""
        if not any(name.startswith(self.prefix) for name in theirs):
            theirs = {self.prefix + name: tensor for name, tensor in theirs.items()}
        kept = {name: tensor for name, tensor in theirs.items() if not re.fullmatch(self.constants, name)}
        for repeat, first in self.repeats.items():
            if repeat in kept and first in kept and not torch.equal(kept.pop(repeat), kept[first]):
                raise UserError(f"{repeat} differs from {first}: set model.tie_embeddings=false to keep both")
        return kept


def _check_names(given: Iterable[str], wanted: Iterable[str]) -> None:
    have, need = set(given), set(wanted)
    problems = [f"missing: {name}" for name in sorted(need - have)]
    problems += [f"unknown: {name}" for name in sorted(have - need)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError("the tensors do not fit the model: " + "; ".join(problems[:8]) + more)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One family. Every function but the last takes the family's config."""

    kind: str
    build: Callable[[Any], torch.nn.Module]
    """The model, on the default device (also meta)."""
    weights: Callable[[Any], WeightMap]
    """Raises UserError, naming the option, for a config that the Hugging Face form cannot express."""
    hf_config: Callable[[Any], dict[str, Any]]
    """The content of config.json, without the special tokens' ids."""
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    """The family's config from the content of config.json; UserError, naming the key, for what we do not have."""


def require(cfg: DecoderConfig, family: str, **options: object) -> None:
    """Refuse, by name, options whose values `family`'s Hugging Face form does not have."""
    wrong = {key: getattr(cfg, key) for key, value in options.items() if getattr(cfg, key) != value}
    if wrong:
        said = ", ".join(f"model.{key}={value} (must be {options[key]})" for key, value in wrong.items())
        raise UserError(f"a Hugging Face {family} model cannot express: {said}")


def require_hf(hf: Mapping[str, Any], **keys: object) -> None:
    """Refuse, by name, values in a config.json that our models do not have; an absent key is a legal one."""
    wrong = {key: hf[key] for key, value in keys.items() if hf.get(key, value) != value}
    if wrong:
        said = ", ".join(f"{key}={value} (must be {keys[key]})" for key, value in wrong.items())
        raise UserError(f"config.json describes a {hf['model_type']} model that is not supported: {said}")


def value_of(hf: Mapping[str, Any], key: str) -> Any:
    """What config.json must say.

    Raises:
        UserError: it does not.
    """
    if key not in hf:
        raise UserError(f"config.json has no {key}")
    return hf[key]
