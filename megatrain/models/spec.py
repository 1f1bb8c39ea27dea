"""What a model family provides, and the map between our parameter names and Hugging Face's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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

    def export(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under Hugging Face's names (views where nothing is joined)."""
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
            UserError: a tensor is unknown, missing, or of another shape.
        """
        _check_names(theirs, (rule.theirs for rule in self.rules))
        ours: dict[str, Tensor] = {}
        for rule in self.rules:
            tensor = theirs[rule.theirs].T if rule.transpose else theirs[rule.theirs]
            parts = tensor.split([shapes[name][0] for name in rule.ours]) if len(rule.ours) > 1 else [tensor]
            for name, part in zip(rule.ours, parts, strict=True):
                if part.shape != shapes[name]:
                    raise UserError(
                        f"{rule.theirs} gives {name} the shape {tuple(part.shape)}, the config {tuple(shapes[name])}"
                    )
                ours[name] = part
        return ours


def _check_names(given: Iterable[str], wanted: Iterable[str]) -> None:
    have, need = set(given), set(wanted)
    problems = [f"missing: {name}" for name in sorted(need - have)]
    problems += [f"unknown: {name}" for name in sorted(have - need)]
    if problems:
        raise UserError("the tensors do not fit the model: " + "; ".join(problems[:8]))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One family. Every function takes the family's config."""

    kind: str
    build: Callable[[Any], torch.nn.Module]
    """The model, on the default device (also meta)."""
    weights: Callable[[Any], WeightMap]
    """Raises UserError, naming the option, for a config that the Hugging Face form cannot express."""
    hf_config: Callable[[Any], dict[str, Any]]
    """Keyword arguments of transformers' config, with `model_type`."""


def require(cfg: DecoderConfig, family: str, **options: object) -> None:
    """Refuse, by name, options whose values `family`'s Hugging Face form does not have."""
    wrong = {key: getattr(cfg, key) for key, value in options.items() if getattr(cfg, key) != value}
    if wrong:
        said = ", ".join(f"model.{key}={value} (must be {options[key]})" for key, value in wrong.items())
        raise UserError(f"a Hugging Face {family} model cannot express: {said}")
