"""Config classes: frozen dataclasses whose rules are all checked at once.

Every config class of the project is made by `config` and lives beside its owner (`optim/config.py`, ...).
A docstring below a field is its documentation: meaning, unit and special values. Help texts and the JSON
schema are generated from it. Types are checked by the strict loader (`config/load.py`); every other rule of one
class is reported by its `problems` method, so that a user sees all mistakes at once.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from megatrain.config.errors import UserError

T = TypeVar("T")
ABSENT = object()


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, slotted dataclass in which an unknown key is an error."""
    cls.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    `field` is the dotted path (relative to the config that reports it; the loader adds the prefix), `value`
    the value found there (`ABSENT`: none), `legal` the nearest legal values.
    """

    field: str
    value: object
    rule: str
    legal: tuple[object, ...] = ()

    def __str__(self) -> str:
        hint = f" Nearest legal: {', '.join(map(shown, self.legal))}." if self.legal else ""
        said = self.field if self.value is ABSENT else f"{self.field}={shown(self.value)}"
        return f"{said}: {self.rule}.{hint}"


def shown(value: object) -> str:
    """Return a value as the user writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if is_dataclass(value):
        return f"{{{','.join(f'{each.name}:{shown(getattr(value, each.name))}' for each in fields(value))}}}"
    if isinstance(value, str) and re.fullmatch(r"|true|false|null|[-+]?\d+(\.\d*)?", value):
        return f'"{value}"'  # text that would otherwise be read as another type
    return str(value)


class ConfigError(UserError):
    """The config breaks rules, all of which are in `problems`. The command exits with 2."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"the config has {count}:", *map(str, problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.problems,)  # not the text: errors are pickled to be sent between processes


def divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of `n`, the smallest first; none for n < 1."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def nearest_divisors(n: int, wanted: int, count: int = 2) -> tuple[int, ...]:
    """Return the `count` divisors of `n` nearest to `wanted`."""
    return tuple(sorted(sorted(divisors(n), key=lambda d: abs(d - wanted))[:count]))
