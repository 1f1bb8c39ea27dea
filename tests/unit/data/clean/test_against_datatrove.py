"""Decisions of datatrove on generated documents, kept in `datatrove.json`; it is no dependency.

It was given words split at white space, as ours are, and the thresholds of FineWeb's paper, from which its defaults
differ. Where the two define a rule differently, the difference is named here.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from megatrain.data.clean.config import FineWebRules, GopherRules, RepetitionStep
from megatrain.data.clean.outcome import Refusal
from megatrain.data.clean.quality import apply_rules
from megatrain.data.clean.repetition import too_repetitive
from megatrain.data.clean.words import WordHashes

DOCUMENTS = 300
TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "datatrove.json").read_text())
HASHES = WordHashes()
KEPT = ""


def documents() -> list[str]:
    """Return the same documents on every machine."""
    return [_document(random.Random(seed)) for seed in range(DOCUMENTS)]


def _document(rng: random.Random) -> str:
    vocabulary = [_word(rng) for _ in range(rng.choice((20, 200, 2000)))]
    stop_words = rng.sample(
        ["the", "be", "to", "of", "and", "that", "have", "with"], k=rng.choice((0, 1, 2, 4))
    )
    vocabulary += stop_words * (1 + len(vocabulary) // 20)
    bullets, marks, numbers = (rng.choice((0.0, 0.1, 0.5, 0.95)) for _ in range(3))
    lines = []
    for _ in range(rng.choice((1, 5, 20, 40))):
        words = rng.choices(vocabulary, k=rng.choice((3, 8, 15)))
        words = [str(rng.randrange(10**6)) if rng.random() < numbers * 0.3 else word for word in words]
        line = " ".join(words) + (rng.choice(".!?") if rng.random() < marks else "")
        lines.append(("- " if rng.random() < bullets else "") + line)
    repeated = rng.choice((0, 0, 1, 3, 8))
    lines += rng.choices(lines, k=min(repeated, len(lines)))
    rng.shuffle(lines)
    return rng.choice(("\n", "\n\n")).join(lines) + rng.choice(("", " #" * rng.randrange(12)))


def _word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((1, 2, 3, 5, 8, 13))))


def quality(rules: GopherRules | FineWebRules, text: str) -> str:
    found = apply_rules(rules, text)
    return found.reason if isinstance(found, Refusal) else KEPT


def pairs(name: str, ours: list[str]) -> Counter[tuple[str, str]]:
    """How often our reason and theirs, or none, stand beside each other."""
    return Counter(zip(ours, TABLE["decisions"][name], strict=True))


def differing(found: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Those of which one keeps the document and the other does not."""
    return {pair: count for pair, count in found.items() if (pair[0] == KEPT) != (pair[1] == KEPT)}


def test_gopher() -> None:
    found = pairs("gopher", [quality(GopherRules(), text) for text in documents()])
    bullets = "more than 90 % of the lines begin with a bullet"
    assert set(differing(found)) == {(bullets, KEPT)}  # theirs counts blank lines too
    assert found[KEPT, KEPT] > 50
    for theirs in ("gopher_short_doc", "gopher_below_alpha_threshold", "gopher_enough_stop_words"):
        assert sum(count for (_, other), count in found.items() if other == theirs) > 30


def test_fineweb() -> None:
    found = pairs("fineweb", [quality(FineWebRules(), text) for text in documents()])
    assert differing(found) == {}
    assert found[KEPT, KEPT] > 50
    assert len(found) > 4


def test_repetition() -> None:
    """Lines and paragraphs agree; n-grams do where theirs are not counted with spaces, once, or without overlaps."""
    found = pairs(
        "repetition",
        [getattr(too_repetitive(RepetitionStep(), text, HASHES), "reason", KEPT) for text in documents()],
    )
    for ours, theirs in differing(found):
        assert "gram" in ours + theirs
    parts = [pair for pair in found if "dup_line" in pair[1] or "dup_para" in pair[1]]
    assert parts
    assert all("lines" in ours or "paragraphs" in ours for ours, _ in parts)
    assert sum(differing(found).values()) < 0.2 * len(documents())
