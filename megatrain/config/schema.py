"""Config classes: frozen dataclasses whose rules are all checked at once.

Every config class of the project is made by `config` and lives beside its owner (`optim/config.py`, ...).
A docstring below a field is its documentation: meaning, unit and special values. Help texts and the JSON
schema are generated from it. Types are checked by the strict loader (`config/load.py`); every other rule of one
class is reported by its `problems` method, so that a user sees all mistakes at once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from megatrain.config.errors import UserError

T = TypeVar("T")
ABSENT = object()
MAX_INT = 2**63 - 1  # integers end up in int64 tensors and C libraries


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


def at_least(cfg: Any, low: float, *fields: str) -> Iterator[Problem]:
    """Yield a problem for each of `fields` that is below `low`, not finite, or above `MAX_INT`.

    `null` and `auto` are allowed.
    """
    for name in fields:
        value = getattr(cfg, name)
        if value == "auto":
            continue
        if isinstance(value, int) and value > MAX_INT:
            yield Problem(name, value, "must fit in 63 bits", (MAX_INT,))
        elif value == math.inf:
            yield Problem(name, value, "must be finite")
        elif value is not None and not value >= low:  # not: also for NaN
            yield Problem(name, value, f"must be at least {low:g}", (low,))


def between(cfg: Any, low: float, high: float, *fields: str) -> Iterator[Problem]:
    """Yield a problem for each of `fields` that is outside `[low, high]`; `null` is allowed."""
    for name in fields:
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            yield Problem(
                name, value, f"must be between {low:g} and {high:g}", (low if value < low else high,)
            )


def nearest_divisors(n: int, wanted: int, count: int = 2) -> tuple[int, ...]:
    """Return the `count` divisors of `n` nearest to `wanted`."""
    divisors = [d for d in range(1, n + 1) if n % d == 0] if n > 0 else []
    return tuple(sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:count]))
