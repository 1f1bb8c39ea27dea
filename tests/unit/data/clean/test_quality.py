"""Quality rules at their thresholds: values computed by hand, on either side of each."""

from dataclasses import replace
from typing import Any

import pytest

from megatrain.data.clean.config import C4Rules, FineWebRules, GopherRules
from megatrain.data.clean.outcome import Refusal
from megatrain.data.clean.quality import apply_rules

PUBLISHED = {
    GopherRules: {
        "min_words": 50, "max_words": 100_000, "min_word_length": 3.0, "max_word_length": 10.0,
        "max_symbols_per_word": 0.1, "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8, "min_stop_words": 2,
    },
    C4Rules: {"min_words_per_line": 5, "min_sentences": 3},
    FineWebRules: {
        "min_punctuated_lines": 0.12, "max_duplicate_characters": 0.1, "max_short_lines": 0.67, "short_line": 30,
    },
}  # fmt: skip
"""The thresholds of the papers, typed in a second time."""


@pytest.mark.parametrize("cls", PUBLISHED)
def test_defaults_are_the_published_thresholds(cls: type) -> None:
    rules = cls()
    assert {name: getattr(rules, name) for name in PUBLISHED[cls]} == PUBLISHED[cls]


def reason(rules: Any, text: str) -> str | None:
    found = apply_rules(rules, text)
    return found.reason if isinstance(found, Refusal) else None


def words(count: int, word: str = "words") -> str:
    """A text of `count` words, of which two are stop words."""
    return " ".join(["the", "with", *[word] * (count - 2)])


def lines(*groups: tuple[int, str]) -> str:
    return "\n".join(line for count, line in groups for _ in range(count))


GOPHER = [
    (words(49), "fewer than 50 words"),
    (words(50), None),
    (words(100_000), None),
    (words(100_001), "more than 100,000 words"),
    # 3 x "the" + 4 x "with" ...: 2 stop words of 3 + 4 letters and 98 others
    ("the to " + "abc " * 97 + "abcd", None),  # (3 + 2 + 291 + 4) / 100 = 3
    ("the to " + "abc " * 98, "words shorter than 3 characters on average"),  # 2.99
    ("the to " + "abcdefghij " * 97 + "x" * 25, None),  # (3 + 2 + 970 + 25) / 100 = 10
    ("the to " + "abcdefghij " * 97 + "x" * 26, "words longer than 10 characters on average"),
    (words(100) + "#" * 10, None),  # 10 of 100 words
    (words(100) + "#" * 11, "more than 0.1 # per word"),
    (words(99) + " " + "…" * 10 + "x", None),
    (words(99) + " " + "…" * 5 + "..." * 6 + "x", "more than 0.1 ellipses per word"),
    (lines((9, "- the words with words words words"), (1, "words")), None),  # 9 of 10 lines
    (lines((19, "• the words with words"), (1, "words")), "more than 90 % of the lines begin with a bullet"),
    (lines((3, "words ending in …"), (7, "the words with words words words words")), None),  # 3 of 10
    (lines((4, "words ending in ..."), (6, "the words with words words words words words words")),
     "more than 30 % of the lines end with an ellipsis"),
    (words(80) + " 12345" * 20, None),  # 80 of 100
    (words(79) + " 12345" * 21, "less than 80 % of the words contain a letter"),
    ("The " + "words " * 60 + "words, and.", None),  # "the" and "and", whatever the case and punctuation
    ("the the the " + "words " * 60, "fewer than 2 different stop words"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GOPHER)
def test_gopher(text: str, expected: str | None) -> None:
    assert reason(GopherRules(), text) == expected


def test_gophers_thresholds_can_be_set() -> None:
    assert reason(replace(GopherRules(), min_words=49), words(49)) is None
    assert reason(replace(GopherRules(), min_stop_words=0), "words " * 60) is None


SENTENCES = "This is a sentence with words. Here is another one! And is this the third?"
C4 = [
    (SENTENCES, SENTENCES),
    ("This is a sentence with words. Here is another one!", Refusal("fewer than 3 sentences", "")),
    (f"{SENTENCES}\nA heading without an end mark", SENTENCES),
    (f"{SENTENCES}\nFour words stand here.", SENTENCES),
    (f"{SENTENCES}\nFive words do stand here.", f"{SENTENCES}\nFive words do stand here."),
    (f'{SENTENCES}\nHe said that "it was so."', f'{SENTENCES}\nHe said that "it was so."'),
    (f"{SENTENCES}\nThis line ends in an ellipsis...", SENTENCES),
    (f"{SENTENCES}\nPlease turn on JavaScript in your browser.", SENTENCES),
    (f"{SENTENCES}\nWe have a Privacy Policy for all readers.", SENTENCES),
    (f"{SENTENCES}\nThis site uses cookies for many purposes.", SENTENCES),
    (f"{SENTENCES}\nAs was shown before.[12][citation needed]", f"{SENTENCES}"),  # four words
    (f"{SENTENCES}\nAs was shown long before.[12][edit]", f"{SENTENCES}\nAs was shown long before."),
    (f"{SENTENCES} Lorem Ipsum dolor sit amet.", Refusal('contains "lorem ipsum"', "")),
    (f"{SENTENCES} int main() {{ return 0; }}", Refusal("contains a curly bracket", "")),
    ("No line is here", Refusal("no line is left", "")),
    ("", Refusal("no line is left", "")),
]


@pytest.mark.parametrize(("text", "expected"), C4)
def test_c4(text: str, expected: str | Refusal) -> None:
    found = apply_rules(C4Rules(), text)
    if isinstance(expected, Refusal):
        assert isinstance(found, Refusal)
        assert found.reason == expected.reason
    else:
        assert found == expected


def test_c4s_rules_can_be_switched_off() -> None:
    lenient = C4Rules(
        end_marks=False, min_words_per_line=0, min_sentences=0, javascript=False, policy=False, citations=False,
        lorem_ipsum=False, curly_brackets=False,
    )  # fmt: skip
    text = "\n".join(text for text, _ in C4)
    assert apply_rules(lenient, text) == text


LONG = "A line of more than thirty characters, which ends in a period."
FINEWEB = [
    (lines((12, LONG), (88, LONG.rstrip("."))), "at most 12 % of the lines end with punctuation"),
    ("\n".join(f"{LONG.rstrip('.')} {n}{'.' if n < 13 else ''}" for n in range(100)), None),
    # 10 of 100 characters are in a line that stood before
    ("\n".join(["x" * 9 + "."] * 2 + ["y" * 39 + ".", "z" * 39 + "."]),
     "at least 10 % of the characters in duplicated lines"),
    ("\n".join(["x" * 8 + "."] * 2 + ["y" * 39 + ".", "z" * 42 + "."]), None),  # 9 of 101 characters
    ("\n".join([*(f"{n}".rjust(28, "x") + "." for n in range(67)), *(f"{n}".rjust(29, "x") + "." for n in range(33))]),
     "at least 67 % of the lines shorter than 30 characters"),
    ("\n".join([*(f"{n}".rjust(28, "x") + "." for n in range(66)), *(f"{n}".rjust(29, "x") + "." for n in range(34))]),
     None),
    ("\n \n", "no line is left"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FINEWEB)
def test_fineweb(text: str, expected: str | None) -> None:
    assert reason(FineWebRules(), text) == expected
