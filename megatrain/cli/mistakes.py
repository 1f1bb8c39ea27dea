"""Messages for overrides and config files that could not be composed, in the user's terms."""

import re
from collections.abc import Mapping
from dataclasses import replace

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from megatrain.config.load import keys, unknown_key
from megatrain.config.nearest import nearest
from megatrain.config.schema import ABSENT, Problem
from megatrain.train.config import Config

REMOVABLE = ("recipe", "experiment")
"""Groups that a run can do without. Without one of the others, the classes' defaults would take over in silence."""
NOISE = ("See https://", "full_key:", "object_type=", "reference_type=", "Set the environment")
"""Beginnings of lines in error messages that address programmers."""


def explain(override: Override, error: Exception, tree: DictConfig, groups: dict[str, list[str]]) -> Problem:
    """Explain why `override` can't be applied to `tree`, which contains all overrides that could be."""
    key, field = override.key_or_group, override.get_key_element()
    value: object = ABSENT if override.is_delete() else override.value()
    if isinstance(value, Mapping):
        unknown = [name for name in value if f"{key}.{name}" not in keys(Config)]
        return (
            _no_such_key(f"{key}.{unknown[0]}", value[unknown[0]])
            if unknown
            else Problem(field, value, in_words(error))
        )
    if key in groups and value not in groups[key]:
        near = nearest(str(value), groups[key], 3) or tuple(groups[key])
        none = f"; to choose none, write ~{key}" if value is None and key in REMOVABLE else ""
        return Problem(field, value, f"is not an option of the group {key}{none}", near)
    if override.is_add() and OmegaConf.select(tree, key) is not None:
        return Problem(field, value, f"exists already; write {key}=VALUE")
    if key in groups or override.is_add() or override.is_delete():
        return Problem(field, value, in_words(error))
    if key not in keys(Config):
        return _no_such_key(field, value, *groups)
    return _not_here(field, value, tree) or Problem(field, value, in_words(error))


def cannot_be_removed(override: Override) -> Problem:
    """Report `~key`: a run needs every group and every key."""
    key = override.key_or_group
    if key not in keys(Config):
        return replace(_no_such_key(key, ABSENT), field=f"~{key}")
    return Problem(f"~{key}", ABSENT, f"can't be removed; set it, {key}=..., or leave it at its default")


def must_be_given(path: str) -> Problem:
    """Report a key without a default that the user did not give."""
    return Problem(path, ABSENT, f"must be given; write {path}=VALUE")


def in_words(error: BaseException) -> str:
    """Put an error of Hydra, OmegaConf or PyYAML into one sentence, without hints for programmers."""
    text = str(error) or str(error.__cause__ or type(error).__name__)
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE)).rstrip(".")


def _no_such_key(path: str, value: object, *groups: str) -> Problem:
    return unknown_key(Config, path, value, groups)


def _not_here(path: str, value: object, tree: DictConfig) -> Problem | None:
    """Report a key that exists, but not in the options chosen here; None if that is not the reason."""
    parent, _, name = path.rpartition(".")
    section = OmegaConf.select(tree, parent)
    group = path.partition(".")[0]
    if group not in tree:  # a primary config of the user's own
        return Problem(path, value, f"the config file chooses no option of {group}; write +{path}=VALUE")
    if section is None:  # as model.rope_scaling is, unless set
        return Problem(path, value, f"{parent} is null; write '{parent}={{{name}:VALUE}}'")
    if OmegaConf.is_dict(section) and "kind" in section:
        return Problem(path, value, f"{parent}.kind is {section.kind}, which has no {name}")
    return None
