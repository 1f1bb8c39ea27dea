"""Suggestions for a misspelled name."""

from collections.abc import Iterable
from difflib import SequenceMatcher

CUTOFF = 0.6
"""Similarity (2 x matching / total characters) below which a name is not suggested."""


def nearest(word: str, names: Iterable[str], count: int = 2) -> tuple[str, ...]:
    """Return at most `count` of `names`, the most similar first.

    Dotted keys are compared in full and by their last part, so that `lr` finds `optim.lr`; a name is suggested
    if either is similar enough, and nearly as similar as the best one.
    """
    scored = sorted(((-_similarity(word, name), name) for name in names), key=lambda pair: pair[0])
    best = scored[0][0] if scored else 0.0
    return tuple(name for score, name in scored[:count] if -score >= CUTOFF and score <= best + 0.1)


def _similarity(word: str, name: str) -> float:
    full = _ratio(word, name)
    if "." not in name:
        return full
    # A word with dots names its section, so a match of the last part alone is weaker evidence.
    weight = 0.7 if "." in word else 0.9
    return max(full, weight * _ratio(word.rpartition(".")[2], name.rpartition(".")[2]))


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()
