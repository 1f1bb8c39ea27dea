"""Ranges of the numbers in a config: part of a field's annotation, checked by the loader, shown by help and schema.

What every text must satisfy is here too.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from megatrain.config.paths import PathMark
from megatrain.config.schema import Problem

MAX_INT = 2**63 - 1
"""Integers end up in int64 tensors and C libraries."""
MAX_SIZE = 2**31 - 1
"""Dimensions of tensors, batches and groups of processes: products of two still fit in int64."""
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 2.0**-126
"""Smallest normal float32. Smaller numbers may be 0 in the device's arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Range of a number; None: no bound on that side but the type's.

    Whatever the range, a float must be 0 or a normal float32, and an integer must fit in 63 bits: anything else ends up
    as infinity, 0 or an overflow in tensors.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def broken_rule(self, value: float) -> str:
        """Return the rule that `value` breaks; empty if it is in the range."""
        if isinstance(value, int) and abs(value) > MAX_INT:
            return "must fit in 63 bits"
        if not math.isfinite(value):
            return "must be finite"
        if value not in self:
            too_large = self.at_most == MAX_SIZE and value > MAX_SIZE
            return f"must be at most {MAX_SIZE}" if too_large else f"must be {self}"
        if isinstance(value, int) or value == 0:
            return ""
        if not FLOAT32_TINY <= abs(value) <= FLOAT32_MAX:
            return f"must be 0 or a float32, {FLOAT32_TINY:.2g} to {FLOAT32_MAX:.2g} in size"
        rounded = struct.unpack("f", struct.pack("f", value))[0]
        return "" if rounded in self else f"must be {self}, also when rounded to float32"

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        at_most = None if self.at_most == MAX_SIZE else self.at_most  # nobody wants to know
        if self.at_least is not None and at_most is not None:
            return f"between {_shown(self.at_least)} and {_shown(at_most)}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": at_most, "below": self.below}
        return " and ".join(f"{word} {_shown(bound)}" for word, bound in bounds.items() if bound is not None)

    def nearest(self, value: float) -> float | None:
        """Return the legal number nearest to an illegal `value`; None if there is none, as at an open end."""
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if value in self:  # the type's own bounds
            if isinstance(value, int):
                return MAX_INT if value > 0 else -MAX_INT
            return 0 if abs(value) < FLOAT32_TINY and 0 in self else None
        if self.at_least is not None and value < self.at_least:
            return self.at_least
        too_high = self.at_most is not None and value > self.at_most
        return self.at_most if too_high else None

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        names = {
            "minimum": self.at_least,
            "exclusiveMinimum": self.above,
            "maximum": self.at_most,
            "exclusiveMaximum": self.below,
        }
        return handler(core) | {name: bound for name, bound in names.items() if bound is not None}


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
DecayRate = Annotated[float, Range(at_least=0, below=1)]
"""Weight of the old value in a moving average. At 1 the average would never move."""
Size = Annotated[int, Range(at_least=1, at_most=MAX_SIZE)]
"""Dimension of a tensor, or a number of parts."""
Count = Annotated[int, Range(at_least=0)]
PositiveCount = Annotated[int, Range(at_least=1)]


@cache
def ranges(cls: type) -> dict[str, Range]:
    """Return field name -> range of the numbers that it holds, for the fields of a config class that declare one.

    A field that a class declares anew, for another default, keeps its base class's range unless it declares its own.
    """
    found: dict[str, Range] = {}
    for base in reversed([each for each in cls.__mro__ if is_dataclass(each)]):
        for name, hint in get_type_hints(base, include_extras=True).items():
            if (own := _range_of(hint)) is not None:
                found[name] = own
    return found


def range_problems(cfg: Any) -> Iterator[Problem]:
    """Yield a problem for each number of `cfg` that is out of its range; sections inside are not entered."""
    for name, each in ranges(type(cfg)).items():  # type: ignore[arg-type]
        problem = range_problem(name, getattr(cfg, name), each)
        if problem is not None:
            yield problem


def range_problem(field: str, value: Any, allowed: Range, *, has_null: bool = False) -> Problem | None:
    """Return the problem of a field's number or numbers; None if all are in the range, or there are none.

    Args:
        has_null: `null` is legal too, and suggested where no number is.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and (rule := allowed.broken_rule(number)):
            near = allowed.nearest(number)
            legal = () if isinstance(value, tuple) or (near is None and not has_null) else (near,)
            return Problem(field, value, rule, legal)
    return None


@cache
def paths(cls: type) -> frozenset[str]:
    """Return the names of the fields of a config class that are paths."""
    return frozenset(
        name
        for name, hint in get_type_hints(cls, include_extras=True).items()
        for member in (hint, *get_args(hint))
        if any(isinstance(mark, PathMark) for mark in getattr(member, "__metadata__", ()))
    )


def text_problem(field: str, value: Any) -> Problem | None:
    """Return the problem of a text or texts that no file can hold: not UTF-8, or with NUL; None if there is none."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and (not text.isprintable() or not text.isascii()):
            try:
                text.encode()
            except UnicodeEncodeError:
                return Problem(field, value, "must be UTF-8 text, as the run's files are")
            if "\0" in text:
                return Problem(field, value, "must not contain the character NUL")
    return None


def _range_of(hint: Any) -> Range | None:
    metadata = getattr(hint, "__metadata__", ())
    own = next((each for each in metadata if isinstance(each, Range)), None)
    return own or next((inner for inner in map(_range_of, get_args(hint)) if inner is not None), None)


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
