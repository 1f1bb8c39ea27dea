"""Gopher's limits on repetition within a document. Thresholds and source are in `config.py`."""

import re
from collections.abc import Sequence

import numpy as np

from megatrain.data.clean.config import RepetitionStep
from megatrain.data.clean.outcome import Refusal, excerpt, percent
from megatrain.data.clean.quality import duplicated_characters, lines_of
from megatrain.data.clean.words import WordHashes, ngram_hashes

PARAGRAPHS = re.compile(r"\n\s*\n")
FIRST_TOP, FIRST_DUPLICATE, LAST = 2, 5, 10
"""Lengths of n-grams: the most frequent one is looked at from 2 on, duplicates from 5 to 10."""


def too_repetitive(step: RepetitionStep, text: str, hashes: WordHashes) -> Refusal | None:
    """Return which limit `text` exceeds; None if it keeps them all."""
    broken = _parts(step, text) or _ngrams(step, text.split(), hashes)
    return Refusal(broken, excerpt(text)) if broken else None


def _parts(step: RepetitionStep, text: str) -> str:
    """Return the limit on lines or paragraphs that `text` exceeds; empty if none."""
    paragraphs = [stripped for part in PARAGRAPHS.split(text) if (stripped := part.strip())]
    for name, parts, most, most_characters in (
        ("lines", lines_of(text), step.duplicate_lines, step.duplicate_line_characters),
        ("paragraphs", paragraphs, step.duplicate_paragraphs, step.duplicate_paragraph_characters),
    ):
        if len(parts) - len(set(parts)) > most * len(parts):
            return f"more than {percent(most)} of the {name} are duplicates"
        if duplicated_characters(parts) > most_characters * sum(map(len, parts)):
            return f"more than {percent(most_characters)} of the characters in duplicate {name}"
    return ""


def _ngrams(step: RepetitionStep, words: Sequence[str], hashes: WordHashes) -> str:
    """Return the limit on n-grams that `words` exceed; empty if none.

    White space does not count as characters. A character in several duplicate n-grams counts once.
    """
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], lengths.cumsum()])
    total, hashed = ends[-1], hashes.of(words)
    for n in range(FIRST_TOP, LAST + 1):
        grams = ngram_hashes(hashed, n)
        order = np.argsort(grams, kind="stable")
        sorted_grams = grams[order]
        is_first = (
            np.concatenate([[True], sorted_grams[1:] != sorted_grams[:-1]]) if len(order) else order == 0
        )
        if is_first.all():
            return ""  # longer n-grams can't be duplicates either
        if n < FIRST_TOP + len(step.top_ngrams):
            starts = np.flatnonzero(is_first)
            counts = np.diff(starts, append=len(order))
            at = order[starts[counts == counts.max()]]
            longest = (ends[at + n] - ends[at]).max()  # of those that are equally frequent
            if counts.max() * longest > (most := step.top_ngrams[n - FIRST_TOP]) * total:
                return f"more than {percent(most)} of the characters in the most frequent {n}-gram"
        if n >= FIRST_DUPLICATE:
            again = order[~is_first]  # the sort is stable: an occurrence that is not the first one
            edges = np.zeros(len(words) + 1, np.int64)
            edges[again] += 1
            edges[again + n] -= 1  # positions in `again` differ from each other
            covered = lengths[edges.cumsum()[:-1] > 0].sum()
            if covered > (most := step.duplicate_ngrams[n - FIRST_DUPLICATE]) * total:
                return f"more than {percent(most)} of the characters in duplicate {n}-grams"
    return ""
