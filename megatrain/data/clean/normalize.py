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
CANDIDATE = re.compile(f"[^\0-\u02ff]{{{LONG_RUN},}}")
"""What holds every long run, and is found faster: the first combining mark is U+0300."""


def normalize(text: str, form: Literal["NFC", "NFKC", "NFD", "NFKD"]) -> str:
    """Return `text` in a normalization form.

    Python sorts runs of combining marks by insertion, in quadratic time. Long runs are sorted before,
    which is the first part of every form (UAX #15, canonical ordering) and so changes no result.
    """
    if text.isascii():
        return text
    ordered = CANDIDATE.sub(lambda found: _long_runs().sub(_ordered, found[0]), text)
    return unicodedata.normalize(form, ordered)


@cache
def _long_runs() -> re.Pattern[str]:
    """Return the pattern of long runs of combining marks."""
    marks = [code for code in range(LAST_MARK) if unicodedata.combining(chr(code))]
    known = set(marks)
    firsts = [code for code in marks if code - 1 not in known]
    lasts = [code for code in marks if code + 1 not in known]
    ranges = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))
    return re.compile(f"[{ranges}]{{{LONG_RUN},}}")


def _ordered(run: re.Match[str]) -> str:
    by_class: Callable[[str], int] = unicodedata.combining
    return "".join(sorted(run[0], key=by_class))
