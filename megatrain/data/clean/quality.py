"""Published quality rules: Gopher's, C4's and FineWeb's. Thresholds and sources are in `config.py`."""

import re
from collections import Counter
from collections.abc import Sequence

from megatrain.data.clean.config import C4Rules, FineWebRules, GopherRules
from megatrain.data.clean.outcome import Refusal, excerpt, percent

STOP_WORD = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
END_MARKS = (".", "!", "?", '"', "”")
PUNCTUATION = (*END_MARKS, *"…’»。｡！？」』؟۔।॥።။។")
"""What ends a sentence, in the scripts of most languages."""
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]", re.IGNORECASE)
POLICY = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]{0,4}(?=\s|$)")


def lines_of(text: str) -> list[str]:
    """Return the lines of `text` that are not blank, without white space at their ends."""
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def duplicated_characters(parts: Sequence[str]) -> int:
    """Return the characters in those of `parts` that are equal to an earlier one."""
    return sum(map(len, parts)) - sum(map(len, set(parts)))


def apply_rules(rules: GopherRules | C4Rules | FineWebRules, text: str) -> str | Refusal:
    """Return the text that `rules` leave, or why they remove the document."""
    if isinstance(rules, C4Rules):
        return _c4(rules, text)
    broken = _gopher(rules, text) if isinstance(rules, GopherRules) else _fineweb(rules, text)
    return Refusal(broken, excerpt(text)) if broken else text


def _gopher(rules: GopherRules, text: str) -> str:
    """Return the first of Gopher's rules that `text` breaks; empty if it keeps them all."""
    words = text.split()
    if len(words) < rules.min_words:
        return f"fewer than {rules.min_words:,} words"
    if len(words) > rules.max_words:
        return f"more than {rules.max_words:,} words"
    mean = sum(map(len, words)) / len(words)
    if mean < rules.min_word_length:
        return f"words shorter than {rules.min_word_length:g} characters on average"
    if mean > rules.max_word_length:
        return f"words longer than {rules.max_word_length:g} characters on average"
    for name, count in (("#", text.count("#")), ("ellipses", sum(map(text.count, ELLIPSES)))):
        if count > rules.max_symbols_per_word * len(words):
            return f"more than {rules.max_symbols_per_word:g} {name} per word"
    lines = lines_of(text)
    if sum(line.startswith(BULLETS) for line in lines) > rules.max_bullet_lines * len(lines):
        return f"more than {percent(rules.max_bullet_lines)} of the lines begin with a bullet"
    if sum(line.endswith(ELLIPSES) for line in lines) > rules.max_ellipsis_lines * len(lines):
        return f"more than {percent(rules.max_ellipsis_lines)} of the lines end with an ellipsis"
    counts = Counter(words)
    alphabetic = sum(count for word, count in counts.items() if LETTER.search(word))
    if alphabetic < rules.min_alphabetic_words * len(words):
        return f"less than {percent(rules.min_alphabetic_words)} of the words contain a letter"
    if not _has_stop_words(text, rules.min_stop_words):
        return f"fewer than {rules.min_stop_words} different stop words"
    return ""


def _has_stop_words(text: str, least: int) -> bool:
    found: set[str] = set()
    for word in STOP_WORD.finditer(text) if least else ():
        found.add(word[0].lower())
        if len(found) >= least:
            break
    return len(found) >= least


def _c4(rules: C4Rules, text: str) -> str | Refusal:
    """Remove C4's unwanted lines, and documents that contain too little, placeholder text or code."""
    if rules.curly_brackets and "{" in text:
        return Refusal("contains a curly bracket", excerpt(text, text.index("{")))
    lowered = text.lower()
    if rules.lorem_ipsum and "lorem ipsum" in lowered:
        return Refusal('contains "lorem ipsum"', excerpt(text, lowered.index("lorem ipsum")))
    cited = CITATION.sub("", text) if rules.citations else text
    left = "\n".join(line for line in cited.split("\n") if _keeps_line(rules, line.strip()))
    if not left.strip():
        return Refusal("no line is left", excerpt(text))
    if rules.min_sentences and len(SENTENCE_END.findall(left)) < rules.min_sentences:
        return Refusal(f"fewer than {rules.min_sentences} sentences", excerpt(text))
    return left


def _keeps_line(rules: C4Rules, line: str) -> bool:
    """Return whether C4 keeps `line`, which has no white space at its ends."""
    if rules.end_marks and (not line.endswith(END_MARKS) or line.endswith(ELLIPSES)):
        return False
    if rules.min_words_per_line and len(line.split()) < rules.min_words_per_line:
        return False
    lowered = line.lower()
    if rules.javascript and "javascript" in lowered:
        return False
    return not (rules.policy and any(notice in lowered for notice in POLICY))


def _fineweb(rules: FineWebRules, text: str) -> str:
    """Return the first of FineWeb's rules that `text` breaks; empty if it keeps them all."""
    lines = lines_of(text)
    if not lines:
        return "no line is left"
    punctuated = sum(line.endswith(PUNCTUATION) for line in lines)
    if punctuated <= rules.min_punctuated_lines * len(lines):
        return f"at most {percent(rules.min_punctuated_lines)} of the lines end with punctuation"
    if duplicated_characters(lines) >= rules.max_duplicate_characters * sum(map(len, lines)):
        return f"at least {percent(rules.max_duplicate_characters)} of the characters in duplicated lines"
    if sum(len(line) < rules.short_line for line in lines) >= rules.max_short_lines * len(lines):
        return f"at least {percent(rules.max_short_lines)} of the lines shorter than {rules.short_line} characters"
    return ""
