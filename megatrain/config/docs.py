"""Documentation of config keys, read from the docstrings below the fields, and the JSON schema of a config class."""

import ast
import inspect
import sys
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatrain.config.load import config_classes, expected, hints, item_classes, kind_of
from megatrain.config.ranges import ranges
from megatrain.config.schema import shown


@dataclass(frozen=True, slots=True)
class Key:
    """Documentation of one leaf of a config, for help texts."""

    path: str
    type: str
    """Type and range of its values, in words."""
    default: str
    """Default value as the user would write it; `kind: value` for each kind where kinds differ."""
    doc: str
    """Meaning of the key; empty if it has no docstring."""
    only: tuple[str, ...] = ()
    """Kinds of its section that have the key; empty: all."""


def describe(cls: type, prefix: str = "") -> list[Key]:
    """Return every leaf that a config of type `cls` may have, in the order of the fields."""
    rows: list[Key] = []
    defaults = {field.name: field.default for field in fields(cls)}
    for name, hint in hints(cls).items():
        path, classes = prefix + name, config_classes(hint)
        if len(classes) == 1:
            rows += describe(classes[0], f"{path}.")
        elif classes:
            kinds = {kind_of(inner): describe(inner, f"{path}.") for inner in classes}
            default = kind_of(type(defaults[name]))
            doc = _own_docs(cls).get(name, "Set by the choice of the group.")
            rows.append(Key(f"{path}.kind", f"one of {', '.join(kinds)}", default, doc))
            rows += _merged(kinds, besides=f"{path}.kind")
        else:
            bounds = str(ranges(cls).get(name, ""))
            type_ = f"{expected(hint)}; {bounds}" if bounds else expected(hint)
            rows.append(Key(path, type_, shown(defaults[name]), _own_docs(cls).get(name, "")))
            for item in item_classes(hint):
                kind = f"{path}[{kind_of(item)}]."
                rows += [row for row in describe(item, kind) if row.path != f"{kind}kind"]
    return rows


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of a config class, with the field docstrings as descriptions (needs pydantic)."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).json_schema()


def _merged(by_kind: dict[str, list[Key]], *, besides: str) -> list[Key]:
    """Merge the keys of a section's kinds: each key once, with the kinds that have it."""
    found: dict[str, dict[str, Key]] = {}
    for kind, rows in by_kind.items():
        for row in rows:
            found.setdefault(row.path, {})[kind] = row
    del found[besides]
    merged = []
    for path, of_kind in found.items():
        first = next(iter(of_kind.values()))
        same = all(row.default == first.default for row in of_kind.values())
        default = (
            first.default if same else ", ".join(f"{kind}: {row.default}" for kind, row in of_kind.items())
        )
        doc = next((row.doc for row in of_kind.values() if row.doc), "")
        only = () if len(of_kind) == len(by_kind) else tuple(of_kind)
        merged.append(Key(path, first.type, default, doc, only))
    return merged


@cache
def _own_docs(cls: type) -> dict[str, str]:
    """Return the docstring of each field of a class; a field without one takes its base class's."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            docs |= _docs_in_source(base.__module__).get(base.__name__, {})
    return docs


@cache
def _docs_in_source(module: str) -> dict[str, dict[str, str]]:
    """Return class name -> field name -> docstring, from a module's source."""
    source = Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_documented(node.body)) for node in classes}


def _documented(body: list[ast.stmt]) -> list[tuple[str, str]]:
    found = []
    for field, doc in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
            and isinstance(doc.value.value, str)
        ):
            found.append((field.target.id, " ".join(inspect.cleandoc(doc.value.value).split())))
    return found
