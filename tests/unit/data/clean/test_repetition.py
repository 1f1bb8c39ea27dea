"""Repetition: each limit at its threshold, and n-grams against a count by characters and strings."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from megatrain.data.clean.config import RepetitionStep
from megatrain.data.clean.repetition import too_repetitive
from megatrain.data.clean.words import WordHashes

OFF = RepetitionStep(
    duplicate_lines=1, duplicate_paragraphs=1, duplicate_line_characters=1, duplicate_paragraph_characters=1,
    top_ngrams=(1, 1, 1), duplicate_ngrams=(1,) * 6,
)  # fmt: skip


def reason(step: RepetitionStep, text: str) -> str | None:
    found = too_repetitive(step, text, WordHashes())
    return found.reason if found else None


def top(words: list[str], n: int) -> float:
    """Fraction of the characters in the most frequent n-gram, the longest of several; 0 if none repeats."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    return max(most * len("".join(gram)) for gram, count in counts.items() if count == most) / len(
        "".join(words)
    )


def duplicate(words: list[str], n: int) -> float:
    """Fraction of the characters in n-grams that stood before; each character once."""
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / len("".join(words))


@pytest.mark.parametrize("seed", range(40))
def test_ngrams_as_counted_with_strings(seed: int) -> None:
    """A limit just below the true fraction is exceeded, and one just above is not."""
    rng = random.Random(seed)
    vocabulary = [("ab" * 9)[: rng.randrange(1, 8)] + str(n) for n in range(rng.choice((3, 10, 60)))]
    words = rng.choices(vocabulary, k=rng.randrange(12, 150))
    at = rng.randrange(len(words))
    words += words[at : at + 20]
    text = " ".join(words)
    for n in range(2, 11):
        fraction, name = (top(words, n), "top_ngrams") if n < 5 else (duplicate(words, n), "duplicate_ngrams")
        index = n - 2 if n < 5 else n - 5
        for limit, exceeded in ((fraction * 0.999 - 1e-6, True), (fraction * 1.001 + 1e-6, False)):
            if not 0 <= limit <= 1:
                continue
            limits = list(getattr(OFF, name))
            limits[index] = limit
            step = replace(OFF, **{name: tuple(limits), "top_ngrams": tuple(limits) if n < 5 else (9e9,) * 3})
            if n < 5:
                step = replace(step, duplicate_ngrams=(1.0,) * 6)
            found = reason(step, text)
            assert (found is not None and f"{n}-gram" in found) == exceeded, (seed, n, fraction, found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 3 of 10 lines stood before, with 30 of 1,030 characters; then 4 of 10
        ("\n\n".join(["x"] * 4 + [str(n) * 100 for n in range(6)]).replace("\n\n", "\n"), None),
        (
            "\n".join(["x"] * 5 + [str(n) * 100 for n in range(5)]),
            "more than 30 % of the lines are duplicates",
        ),
        # 20 of 100 characters are in a line that stood before; then 21 of 101
        ("\n".join(["x" * 20] * 2 + ["y" * 30, "z" * 30]), None),
        (
            "\n".join(["x" * 21] * 2 + ["y" * 29, "z" * 30]),
            "more than 20 % of the characters in duplicate lines",
        ),
        ("\n\n".join(["a\nb", "a \nc", "a\nd"]), "more than 30 % of the lines are duplicates"),  # 2 of 6
        ("", None),
        ("one", None),
    ],
)
def test_lines(text: str, expected: str | None) -> None:
    limits = replace(OFF, duplicate_lines=0.3, duplicate_line_characters=0.2)
    assert reason(limits, text) == expected


def test_paragraphs() -> None:
    limits = replace(OFF, duplicate_paragraphs=0.3, duplicate_paragraph_characters=0.2)
    three_of_ten = "\n \n".join(["x\ny"] * 4 + [str(n) * 100 for n in range(6)])
    assert reason(limits, three_of_ten) is None
    assert reason(limits, "x\ny\n\n" + three_of_ten) == "more than 30 % of the paragraphs are duplicates"
    assert reason(limits, "\n\n".join(["x" * 20] * 2 + ["y" * 30, "z" * 30])) is None
    more = "\n\n".join(["x" * 21] * 2 + ["y" * 30, "z" * 30])
    assert reason(limits, more) == "more than 20 % of the characters in duplicate paragraphs"


def test_defaults_are_those_of_table_a1() -> None:
    step = RepetitionStep()
    assert (step.duplicate_lines, step.duplicate_paragraphs) == (0.30, 0.30)
    assert (step.duplicate_line_characters, step.duplicate_paragraph_characters) == (0.20, 0.20)
    assert step.top_ngrams == (0.20, 0.18, 0.16)
    assert step.duplicate_ngrams == (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
