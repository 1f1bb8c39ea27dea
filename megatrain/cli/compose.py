"""Composition of a run's config: Hydra merges overrides and YAML files, and the config classes check the result.

Hydra stops at its first error; here an override that fails is recorded and left out, and composition continues, so
that one message names every mistake in the overrides, the files and the values.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from megatrain.cli.base import read_base
from megatrain.cli.classifier import of_classifier, with_classifier
from megatrain.cli.conf import config_dirs, group_options
from megatrain.cli.mistakes import REMOVABLE, cannot_be_removed, explain, in_words, must_be_given
from megatrain.config.errors import UserError
from megatrain.config.legal import confirmed, exists
from megatrain.config.load import accepts, check, config_classes, dump, hint_at, hints, keys, kind_of
from megatrain.config.nearest import nearest
from megatrain.config.paths import expanded
from megatrain.config.schema import ABSENT, ConfigError, Problem
from megatrain.models.config import ModelConfig
from megatrain.train.config import Config
from megatrain.train.files import CONFIG_FILE, IMPORT_FILE, read_config, run_directory

RECIPE = ("lr", "warmup_fraction", "decay_fraction", "final_ratio", "steps", "seq_len", "global_batch_size")
"""Keys of a recipe (`conf/recipe/`): what files of other groups take from it as `${oc.select:recipe.KEY,DEFAULT}`."""
TO_ESCAPE = re.compile(r"(\\*)('|$)")
"""In Hydra's quotes a backslash is an escape only in front of a quote."""


class RequiredError(InterpolationResolutionError):
    """A config file requires the user to set this key."""


@dataclass(frozen=True, slots=True)
class Source:
    """Sources of a run's config other than the overrides."""

    config_dir: str | None = None
    """The user's config directory, searched before the built-in one."""
    config_name: str = "config"
    """Name of the primary config file, without `.yaml`."""
    starts_from_base: bool = False
    """Whether model and tokenizer are those of checkpoint.adopt, which must be given."""


def compose(overrides: list[str], source: Source = Source()) -> Config:
    """Compose and check the config of one run.

    Raises:
        ConfigError: lists every problem of overrides, files and values.
        UserError: the config files can't be read at all.
    """
    with hydra_over(source):
        parsed, broken = parse(overrides)
        classifier, parsed = of_classifier(parsed)
        tree = _compose_rest(parsed, source, broken)
        data = _resolved(tree, "", broken)
        fixed = _base(data, broken) if source.starts_from_base else _imported(data)
        if fixed is not None and not broken:
            broken += _model_overrides(parsed, fixed)
            data = _resolved(_compose(source.config_name, _lines_for(fixed, parsed)), "", broken)
            data["model"] = dump(fixed.model)
        if isinstance(data.get("model"), dict):
            data["model"] |= with_classifier(data, classifier)
    broken += _recipe_problems(data.pop("recipe", None))
    cfg, wrong = check(Config, data)
    if not os.path.exists(
        run_directory(cfg) / CONFIG_FILE
    ):  # not Path's, which raises for a name that is too long
        wrong += cfg.new_run_problems()
    wrong = confirmed(Config, data, wrong, Config.new_run_problems)
    reported = {problem.field for problem in broken}
    broken += [problem for problem in wrong if problem.field not in reported]
    if broken:
        raise ConfigError([_legal_here(problem, cfg) for problem in broken])
    return cfg


def _legal_here(problem: Problem, cfg: Config) -> Problem:
    """Leave out suggested keys that the chosen options of the groups do not have."""
    if problem.field in keys(Config):  # values were suggested
        return problem
    legal = tuple(each for each in problem.legal if each not in keys(Config) or exists(cfg, str(each)))
    return replace(problem, legal=legal)


@contextmanager
def hydra_over(source: Source) -> Iterator[None]:
    """Initialize Hydra with the config directories, the user's before the built-in one."""
    _register()
    *own, shipped = config_dirs(source.config_dir)
    with initialize_config_dir(
        str(shipped), version_base="1.3"
    ):  # keeps Hydra's global state, and restores it
        for directory in own:
            search_path = create_config_search_path(str(shipped))
            search_path.prepend("--config-dir", f"file://{directory}")
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(task_name="megatrain", config_search_path=search_path)
        yield


def parse(overrides: list[str], *, sweep: bool = False) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that follow Hydra's grammar, and a problem for each other one."""
    parser = OverridesParser.create()
    parsed, broken = [], []
    for text in overrides:
        try:
            override = _parse_one(text, parser)
        except (HydraException, ValueError):
            rule = "is not an override; write key=value, quoted for the shell if it has special characters"
            broken.append(Problem(text, ABSENT, rule))
            continue
        if override.is_hydra_override():
            rule = "Hydra's own settings have no effect here; use run.dir, run.name, --config-dir, --multirun"
            broken.append(Problem(text, ABSENT, rule))
        elif override.is_delete() and override.key_or_group.partition(".")[0] not in REMOVABLE:
            broken.append(cannot_be_removed(override))
        elif override.is_sweep_override() and not sweep:
            rule = "names several values: add --multirun to run each of them, or write [a,b] for a list"
            broken.append(Problem(text, ABSENT, rule))
        else:
            parsed.append(override)
    return parsed, broken


def _register() -> None:
    """Register the defaults of every config class as an option `base_*` of its group, the root's as `base_run`."""
    store = ConfigStore.instance()
    root = dump(Config())
    for field in fields(Config):
        classes = config_classes(hints(Config)[field.name])
        if not classes or field.name == "run":  # `run` is not a group: it has no options to choose from
            continue
        del root[field.name]
        for cls in classes:
            kind = kind_of(cls) if len(classes) > 1 else field.name
            store.store(group=field.name, name=f"base_{kind}", node=dump(cls()))
    store.store(name="base_run", node=root)
    # `???` can't be used in a file that extends a base: in OmegaConf a missing value does not replace an existing one.
    OmegaConf.register_new_resolver("required", _required, replace=True)


def _required() -> None:
    """Refuse to resolve `key: ${required:}` in a config file: the user must set this key."""
    raise RequiredError


def _compose(config_name: str, lines: list[str]) -> DictConfig:
    """Compose with Hydra; use the model's recipe unless another is chosen or `~recipe` removes it."""
    overrides = OverridesParser.create().parse_overrides(lines)
    if not any(override.key_or_group == "recipe" for override in overrides):
        loader = GlobalHydra.instance().config_loader()
        choices = loader.compute_defaults_list(config_name, lines, RunMode.RUN).overrides.known_choices
        recipe = f"recipe/{choices.get('model')}"
        if choices.get("recipe", ABSENT) is None and loader.repository.config_exists(recipe):
            lines = [f"recipe={choices['model']}", *lines]
    return hydra_compose(config_name, lines)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A model that comes with its weights, the values that come with it unless others are given, and why."""

    model: ModelConfig
    own: dict[str, str]
    reason: str


def _base(data: dict[str, Any], broken: list[Problem]) -> _Fixed | None:
    """Return the model that fine-tuning starts from; add a problem if `data` names none, or one that can't be read."""
    adopt = data.get("checkpoint", {}).get("adopt")
    if not isinstance(adopt, str):
        broken.append(must_be_given("checkpoint.adopt"))
        return None
    try:
        base = read_base(expanded(adopt))
    except UserError as error:
        broken.append(
            Problem("checkpoint.adopt", adopt, str(error).removeprefix(f"checkpoint.adopt={adopt}: "))
        )
        return None
    own = {"recipe": "imported", "data": "chat", "seq_len": str(base.seq_len)}
    own |= {f"data.tokenizer.{key}": _quoted(value) for key, value in base.tokenizer.items()}
    own["run.name"] = _quoted(f"{base.name}-tuned")
    return _Fixed(base.model, own, f"it is that of {adopt}")


def _imported(data: dict[str, Any]) -> _Fixed | None:
    """Return the model of the run that `data` names if that run was imported."""
    try:
        directory = Path(data["run"]["dir"]) / data["run"]["name"]
        imported = read_config(directory) if (directory / IMPORT_FILE).is_file() else None
    except (
        KeyError,
        TypeError,
        OSError,
    ):  # missing, of a wrong type or too long: the config classes report it
        return None
    if imported is None:
        return None
    own = {
        "recipe": "imported",
        "seq_len": str(imported.seq_len),
        "data.tokenizer.kind": "huggingface",
        "data.tokenizer.path": _quoted(str(Path(imported.run.dir) / imported.run.name / "tokenizer")),
    }
    return _Fixed(imported.model, own, "the run was imported, and its model is fixed")


def _lines_for(fixed: _Fixed, parsed: list[Override]) -> list[str]:
    """Return the overrides preceded by the values that come with the model: tokenizer, sequence length and recipe."""
    given = [override.input_line or "" for override in parsed]
    taken = {override.key_or_group for override in parsed}
    return [f"{key}={value}" for key, value in fixed.own.items() if key not in taken] + given


def _model_overrides(parsed: list[Override], fixed: _Fixed) -> list[Problem]:
    return [
        Problem(override.key_or_group, override.value(), f"can't be changed: {fixed.reason}")
        for override in parsed
        if override.key_or_group.partition(".")[0] == "model"
    ]


def _recipe_problems(recipe: Any) -> list[Problem]:
    """Return a problem for each key of the recipe that no config file reads."""
    return [
        Problem(f"recipe.{key}", value, "is not a key of recipes", nearest(key, RECIPE))
        for key, value in (recipe or {}).items()
        if key not in RECIPE
    ]


def _compose_rest(parsed: list[Override], source: Source, broken: list[Problem]) -> DictConfig:
    """Compose with all overrides that can be applied; add a problem to `broken` for each other one."""
    lines = [override.input_line or "" for override in parsed]
    try:
        return _compose(source.config_name, lines)
    except Exception:  # errors of OmegaConf, PyYAML, the file system and Hydra itself
        pass  # the failing overrides are found below, one by one
    try:
        tree = _compose(source.config_name, [])
    except Exception as error:
        raise UserError(f"The config files can't be composed: {in_words(error)}") from error
    groups = group_options(source.config_dir)
    accepted: list[str] = []
    for override in sorted(parsed, key=lambda override: override.key_or_group not in groups):
        try:
            tree = _compose(source.config_name, [*accepted, override.input_line or ""])
            accepted.append(override.input_line or "")
        except Exception as error:
            broken.append(explain(override, error, tree, groups))
    return tree


def _resolved(node: DictConfig, prefix: str, broken: list[Problem]) -> dict[str, Any]:
    """Return plain data with interpolations resolved; add a problem for each that fails and each missing key."""
    data: dict[str, Any] = {}
    for key in node:
        path = prefix + str(key)
        if OmegaConf.is_missing(node, key):
            broken.append(must_be_given(path))
            continue
        try:
            value = node[key]
            if OmegaConf.is_list(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except RequiredError:
            broken.append(must_be_given(path))
            continue
        except OmegaConfBaseException as error:
            raw = dict(node.items_ex(resolve=False))[key]
            broken.append(Problem(path, str(raw), in_words(error)))
            continue
        data[str(key)] = _resolved(value, f"{path}.", broken) if OmegaConf.is_dict(value) else value
    return data


def _parse_one(text: str, parser: OverridesParser) -> Override:
    """Parse one override; in a field that takes text, a value that is not text to Hydra is taken as text all the same.

    Raises:
        HydraException: it is not an override.
        ValueError: it contains a number with more digits than Python parses.
    """
    key, equals, value = text.partition("=")
    hint = hint_at(Config, key.lstrip("+"))
    as_text = f"{key}={_quoted(value)}" if equals and hint is not None and accepts(hint, "any text") else None
    try:
        override = parser.parse_override(text)
    except (HydraException, ValueError):
        if as_text is None:
            raise
        return parser.parse_override(as_text)
    if as_text is None or override.is_sweep_override() or accepts(hint, override.value()):
        return override
    return parser.parse_override(as_text)


def _quoted(text: str) -> str:
    escaped = TO_ESCAPE.sub(lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"
