"""Unicode normalization in linear time."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Literal

LONG_RUN = 64
"""Combining marks in a row that no writing system comes near to."""
LAST_MARK = 0x1F000
"""Code points from here on combine with nothing."""


def normalize(text: str, form: Literal["NFC", "NFKC", "NFD", "NFKD"]) -> str:
    """Return `text` in a normalization form.

    Python sorts runs of combining marks by insertion, in quadratic time. Long runs are sorted before,
    which is the first part of every form (UAX #15, canonical ordering) and so changes no result.
    """
    if text.isascii():
        return text
    return unicodedata.normalize(form, _long_runs().sub(_ordered, text))


@cache
def _long_runs() -> re.Pattern[str]:
    """Return the pattern of long runs of combining marks."""
    marks = "".join(chr(code) for code in range(LAST_MARK) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{{LONG_RUN},}}")


def _ordered(run: re.Match[str]) -> str:
    by_class: Callable[[str], int] = unicodedata.combining
    return "".join(sorted(run[0], key=by_class))
