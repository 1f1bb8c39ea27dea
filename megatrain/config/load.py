"""Strict conversion between plain data and config objects, with every mistake reported at once.

The loader walks the config classes: unknown keys, wrong types and values outside a `Literal` become
problems, the value at fault is replaced by its default, and then every class's own rules (`problems`) are
asked. Where a field is a union of config classes, the key `kind` selects one. Only the standard library is
used: a run reads its frozen config on machines without a validation library, and the command starts faster.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatrain.config.aliases import advice
from megatrain.config.errors import UserError
from megatrain.config.nearest import nearest
from megatrain.config.paths import expanded
from megatrain.config.ranges import Range, paths, range_problem, range_problems, ranges, text_problem
from megatrain.config.schema import ABSENT, ConfigError, Problem

T = TypeVar("T")
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}


def load(cls: type[T], data: Mapping[str, Any]) -> T:
    """Return the config of type `cls` that `data` describes; keys that are not given have their defaults.

    Raises:
        ConfigError: with all problems of the whole tree.
    """
    cfg, broken = check(cls, data)
    if broken:
        raise ConfigError(broken)
    return cfg


def check(cls: type[T], data: Mapping[str, Any]) -> tuple[T, list[Problem]]:
    """Do as `load`, but return the problems together with a config that has defaults in place of illegal values."""
    walk = _Walk(cls)
    cfg = walk.build(cls, data, "")
    reported = {problem.field for problem in walk.broken}
    names = {path.rpartition(".")[2] for path in reported}
    rules = (problem for problem in rule_problems(cfg) if problem.field not in reported)
    # A rule that names a repaired field speaks of a value that is not the user's.
    return cfg, walk.broken + [each for each in rules if names.isdisjoint(re.findall(r"\w+", each.rule))]


def rule_problems(cfg: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield the numbers out of range in `cfg` and in all configs inside it, and what their `problems` methods report.

    The rules of a config with a number out of range are not asked: they may divide by it.
    """
    for problem in list(range_problems(cfg)) or getattr(cfg, "problems", tuple)():
        yield Problem(prefix + problem.field, problem.value, problem.rule, problem.legal)
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if is_dataclass(value):
            yield from rule_problems(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and any(map(is_dataclass, value)):
            for index, item in enumerate(value):
                yield from rule_problems(item, f"{prefix}{field.name}[{index}].")


def dump(cfg: Any) -> dict[str, Any]:
    """Return `cfg` as plain dicts, lists and scalars: `load(type(cfg), dump(cfg)) == cfg`."""
    return {field.name: _plain(getattr(cfg, field.name)) for field in fields(cfg)}


def flatten(cfg: Any, prefix: str = "") -> dict[str, object]:
    """Return dotted path -> value of every leaf, in the order of the classes' fields."""
    flat: dict[str, object] = {}
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def digest(cfg: Any) -> str:
    """Return the SHA-256 (hex) of the config's values, the same on every machine."""
    text = json.dumps(dump(cfg), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def keys(cls: type, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted paths of all sections and leaves that a config of type `cls` may have, of any kind."""
    found: dict[str, None] = {}
    for name, hint in hints(cls).items():
        found[prefix + name] = None
        for inner in config_classes(hint):
            found |= dict.fromkeys(keys(inner, f"{prefix}{name}."))
    return tuple(found)


def hint_at(cls: type, path: str) -> Any:
    """Return the annotation of the leaf or section at a dotted path, or None if no kind has such a key."""
    name, _, rest = path.partition(".")
    hint = hints(cls).get(name)
    if not rest or hint is None:
        return hint
    found = (hint_at(inner, rest) for inner in config_classes(hint))
    return next((inner for inner in found if inner is not None), None)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return field name -> resolved annotation of a config class."""
    found = get_type_hints(cls)
    return {field.name: found[field.name] for field in fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union; a one-tuple for any other annotation."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def config_classes(hint: Any) -> tuple[type, ...]:
    """Return the config classes that a field annotated with `hint` may hold; empty for a leaf."""
    return tuple(member for member in members(hint) if is_dataclass(member) and isinstance(member, type))


def item_classes(hint: Any) -> tuple[type, ...]:
    """Return the config classes that the items of a list annotated with `hint` may be; empty for anything else."""
    return config_classes(get_args(hint)[0]) if get_origin(hint) is tuple else ()


def kind_of(cls: type) -> str:
    """Return the value of `kind` that selects this class in a union."""
    return str(get_args(hints(cls)["kind"])[0])


def accepts(hint: Any, value: object) -> bool:
    """Return whether `value`, as read from YAML, is legal for a leaf annotated with `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(accepts(member, value) for member in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:  # tuple[X, ...] is the only form that configs use
        return isinstance(value, list | tuple) and all(accepts(args[0], item) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def expected(hint: Any) -> str:
    """Describe in words the values that `accepts` allows."""
    origin, args = get_origin(hint), get_args(hint)
    if classes := item_classes(hint):
        return f"a list of {', '.join(map(kind_of, classes))}"
    if origin in (Union, UnionType):
        return " or ".join(expected(member) for member in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list of {expected(args[0])}"
    return NAMES[hint]


def unknown_key(root: type, path: str, value: object, also: Iterable[str] = ()) -> Problem:
    """Report a key that configs of type `root` do not have: renamed, removed, of another framework, or misspelled.

    `also` holds further names that the user may have meant, such as config groups.
    """
    renamed: Mapping[str, str | None] = getattr(root, "RENAMED", {})
    if path not in renamed:
        if known := advice(path):
            return Problem(path, value, known)
        return Problem(
            path, value, "there is no such key", nearest(path, dict.fromkeys([*keys(root), *also]))
        )
    new = renamed[path]
    return Problem(path, value, "this key was removed" if new is None else f"this key is now {new}")


def upgrade(root: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with the present keys and values if an earlier `schema_version` wrote it.

    `root.RENAMED` and `root.CHANGED` say what changed.
    """
    newest = getattr(root(), "schema_version", None)
    written = data.get("schema_version")
    if not isinstance(written, int) or newest is None or written >= newest:
        return dict(data)
    renamed: Mapping[str, str | None] = getattr(root, "RENAMED", {})
    changed: Mapping[str, Mapping[object, object]] = getattr(root, "CHANGED", {})

    def moved(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.items():
            new = renamed.get(prefix + key, prefix + key)
            if new is None:
                continue
            name = new.rpartition(".")[2]
            if isinstance(value, Mapping):
                found[name] = moved(value, f"{new}.")
            else:
                found[name] = changed[new].get(value, value) if new in changed else value
        return found

    return moved(data, "") | {"schema_version": newest}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return dump(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Walk:
    """One load: walks the classes and the data in parallel and collects the problems."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.broken: list[Problem] = []

    def build(self, cls: type[T], data: Mapping[str, Any], prefix: str) -> T:
        """Build `cls` from `data`; an illegal value is reported and leaves the default."""
        known = hints(cls)  # type: ignore[arg-type]
        for key in data:
            if key not in known:
                also = [prefix + name for name in known]
                self.broken.append(unknown_key(self.root, f"{prefix}{key}", data[key], also))
        allowed = ranges(cls)  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for name, hint in known.items():
            if name in data:
                before = len(self.broken)
                value = self.value(hint, data[name], prefix + name, allowed.get(name))
                if value is not None and name in paths(cls):  # type: ignore[arg-type]
                    value = self.expanded(value, prefix + name)
                if value is not None or len(self.broken) == before:
                    values[name] = value
        return cls(**values)

    def value(self, hint: Any, value: Any, path: str, allowed: Range | None) -> Any:
        """Return the value of one field; None, with a problem reported, if it is illegal."""
        classes = config_classes(hint)
        if not classes and accepts(hint, value):
            found = _convert(hint, value)
            has_null = NoneType in members(hint)
            problem = text_problem(path, found)
            if allowed is not None:
                problem = range_problem(path, found, allowed, has_null=has_null)
            if problem:
                self.report(path, value, problem.rule, problem.legal)
                return None
            return found
        if value is None and NoneType in members(hint):
            return None
        if items := item_classes(hint):
            return self.items(items, hint, value, path)
        if not classes:
            # A value that meant something in an earlier version is answered with its present form.
            changed: Mapping[object, object] = getattr(self.root, "CHANGED", {}).get(path, {})
            legal = (
                (changed[value],) if _is_scalar(value) and value in changed else _nearest_values(hint, value)
            )
            self.report(path, value, f"must be {expected(hint)}", legal)
            return None
        if isinstance(value, str) and all(getattr(cls, "BY_NAME", False) for cls in classes):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            self.report(path, value, "must be a mapping of keys to values")
            return None
        return self.section(classes, value, path)

    def items(self, classes: tuple[type, ...], hint: Any, value: Any, path: str) -> Any:
        """Return a list of configs; None, with problems reported, if the list or one of them is illegal."""
        if not isinstance(value, list | tuple):
            legal = ((value,),) if isinstance(value, str) and value in map(kind_of, classes) else ()
            self.report(path, value, f"must be {expected(hint)}", legal)
            return None
        union = get_args(hint)[0]
        found = tuple(self.value(union, item, f"{path}[{n}]", None) for n, item in enumerate(value))
        if None not in found:
            return found
        for n, item in enumerate(found):  # their rules are not asked once the list is given up
            self.broken += rule_problems(item, f"{path}[{n}].") if item is not None else ()
        return None

    def expanded(self, value: Any, path: str) -> Any:
        """Expand `~` in a path or in each of several; None, with a problem reported, if that is impossible."""
        try:
            return tuple(map(expanded, value)) if isinstance(value, tuple) else expanded(value)
        except UserError as error:
            self.report(path, value, str(error).partition(": ")[2])
            return None

    def section(self, classes: tuple[type, ...], data: Mapping[str, Any], path: str) -> Any:
        """Build one of `classes`; where there are several, the key `kind` says which."""
        if len(classes) == 1:
            return self.build(classes[0], data, f"{path}.")
        kinds = {kind_of(cls): cls for cls in classes}
        kind = data.get("kind", ABSENT)
        if isinstance(kind, str) and kind in kinds:
            return self.build(kinds[kind], data, f"{path}.")
        near = () if kind is ABSENT else nearest(str(kind), kinds)
        self.report(f"{path}.kind", kind, f"must be one of {', '.join(kinds)}", near)
        return None

    def report(self, path: str, value: Any, rule: str, legal: tuple[object, ...] = ()) -> None:
        self.broken.append(Problem(path, value, rule, legal))


def _convert(hint: Any, value: Any) -> Any:
    """Convert an accepted value to what the dataclass holds: lists to tuples, integers to floats where asked."""
    fitting = [member for member in members(hint) if accepts(member, value)]
    member = next((member for member in fitting if member is type(value)), fitting[0])
    if get_origin(member) is tuple:
        return tuple(_convert(get_args(member)[0], item) for item in value)
    if member is not float:
        return value
    try:
        return float(value) + 0.0  # -0.0 becomes 0.0, so that equal configs have equal digests
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _nearest_values(hint: Any, value: object) -> tuple[object, ...]:
    """Return legal values that the user may have meant."""
    choices = [
        str(arg) for member in members(hint) if get_origin(member) is Literal for arg in get_args(member)
    ]
    if choices:
        return nearest(str(value), choices)
    if int in members(hint) and isinstance(value, float) and math.isfinite(value):
        return (round(value),)
    return ()
