"""Suggestions of legal values: only those that are legal beside all other values of the config."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from itertools import islice
from typing import Any

from megatrain.config.load import check, config_classes, hint_at, members
from megatrain.config.schema import Problem

TRIED = 32
"""Integers around an illegal one, on each side, that are tried where no rule knows a legal one."""
SHOWN = 2

Rules = Callable[[Any], Iterable[Problem]]


def confirmed(
    root: type, data: Mapping[str, Any], problems: list[Problem], more: Rules | None = None
) -> list[Problem]:
    """Return `problems` with the suggested values that solve all problems of their field and make no new one.

    All problems of one field get the same suggestions. `more` gives rules that are checked besides the classes' own.
    """
    wanted: dict[str, dict[object, None]] = {}
    for problem in problems:
        wanted.setdefault(problem.field, {}).update(dict.fromkeys(problem.legal))
    known = {problem.field for problem in problems}

    def solves(field: str, value: object) -> bool:
        cfg: Any
        cfg, broken = check(root, _with(data, field.split("."), value))
        left = {problem.field for problem in [*broken, *(more(cfg) if more else ())]}
        return field not in left and left <= known

    found: dict[str, tuple[object, ...]] = {}
    for field, values in wanted.items():
        hint = hint_at(root, field)
        if hint is None or config_classes(hint):  # a name was wrong, not a value
            continue
        legal = [value for value in values if solves(field, value)]
        if values and not legal and int in members(hint):
            around = _integers(next(problem.value for problem in problems if problem.field == field))
            legal = list(islice((value for value in around if solves(field, value)), SHOWN))
        integers = [value for value in legal if isinstance(value, int)]
        found[field] = tuple(sorted(integers)) if len(integers) == len(legal) else tuple(legal)
    return [
        replace(problem, legal=found.get(problem.field, problem.legal)) if problem.legal else problem
        for problem in problems
    ]


def exists(cfg: Any, path: str) -> bool:
    """Return whether `cfg` has the key, or could have it: sections that are null are not looked into."""
    for part in path.split("."):
        if not is_dataclass(cfg):
            return cfg is None
        if not hasattr(cfg, part):
            return False
        cfg = getattr(cfg, part)
    return True


def _with(data: Mapping[str, Any], path: list[str], value: object) -> dict[str, Any]:
    """Return `data` with one value set, in copies of the sections on the way."""
    head, *rest = path
    section = data.get(head)
    return {
        **data,
        head: _with(section if isinstance(section, Mapping) else {}, rest, value) if rest else value,
    }


def _integers(value: object) -> list[object]:
    """Return positive integers near `value`, the nearest first."""
    if not isinstance(value, int) or not 0 <= value < 2**31:
        return []
    powers = {1 << bits for bits in range(value.bit_length() + 1)}
    near = powers | {n for n in range(value - TRIED, value + TRIED + 1) if n > 0}
    return [*sorted(near, key=lambda n: abs(n - value))]
