"""The names that a misspelt one may have meant."""

from collections.abc import Iterable
from difflib import SequenceMatcher

CUTOFF = 0.6
"""Similarity (2 x matching / total characters) below which two names have nothing to do with each other."""


def nearest(word: str, names: Iterable[str], count: int = 2) -> tuple[str, ...]:
    """Return at most `count` of `names`, the most similar first.

    Dotted keys are compared as a whole and by their last part, so that `lr` finds `optim.lr`; a name is taken
    when either is similar enough, and only those nearly as similar as the best one stay.
    """
    scored = sorted(((-_similarity(word, name), name) for name in names), key=lambda pair: pair[0])
    best = scored[0][0] if scored else 0.0
    return tuple(name for score, name in scored[:count] if -score >= CUTOFF and score <= best + 0.1)


def _similarity(word: str, name: str) -> float:
    whole = _ratio(word, name)
    if "." not in name:
        return whole
    # A word with dots says where it belongs, so its last part alone is a weaker sign than that of a bare word.
    weight = 0.7 if "." in word else 0.9
    return max(whole, weight * _ratio(word.rpartition(".")[2], name.rpartition(".")[2]))


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()
