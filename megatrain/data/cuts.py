r"""Where a long text may be cut so that the tokens of its pieces are those of the whole text.

A tokenizer splits text into words, by patterns, and encodes each word by itself. So the tokens stay the same if a word
ends at the cut, and if neither side's words change when the other side is missing.

Claim: for every pattern of `WORDS`, that holds between two characters a and b where

1. a is not white space and b is a space, or
2. a is a letter or a digit of `LETTERS` and `0-9`, and b is one of `SIGNS`, or
3. a is one of `LETTERS` and b is a digit `0-9`.

Proof. A pattern is matched from left to right, each match from where the last one ended; what no match takes stays
together as a gap. There is no look-behind, so words from b on depend on what follows alone, if a word begins at b.
The words up to a change without b only if a match could go on from a to b, or if an assertion is tested just after a.
The only assertions, `(?!\S)` and `$`, follow `\s`, and a is not white space. No alternative goes on from a to b
either, so no match has both; and no gap has both, since in every pattern a match begins at a space and at each of
SIGNS (only DeepSeek's has gaps: of digits and of control characters; in case 3 its match ends at a). In case 1 a
space stands only at the beginning of an alternative (` ?`, `[^\r\n\p{L}\p{N}]?`) or after white space (`\s*`, `\s+`,
`\r?\n[ \t]*`). In cases 2 and 3, whatever can follow a letter or a digit inside a match is a letter, a mark, a digit
after a digit, or `'` with the rest of a contraction; `SIGNS` has none of these. The letters are in scripts whose
characters have been letters in every version of Unicode, so that two libraries agree on them.

Further steps keep the claim. Patterns of `NEUTRAL` (runs of digits, or of Chinese and Japanese characters) match none
of the pairs from a to b, so they put a word's end at the cut or leave it inside a gap, which the next pattern then
splits. NFC changes nothing across the cut: no character of b composes with what stands before it (UAX #15; `<`, `=`
and `>` compose with what follows and are not in SIGNS), and a stays what it is, except for a combining mark in case
1, which becomes part of another character that is not white space. Added tokens are found before anything else, so a
cut must not lie inside one: where a tokenizer has any, case 1 alone is used, and only if no added token contains such
a pair or takes white space beside it.

`tests/unit/data/test_cuts.py` checks all of it against the libraries, on every short text over an alphabet of one
character for each class.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatrain.config.errors import UserError

PIECE_CHARS = 1 << 20
"""Length of a piece in characters: large enough to keep a core busy, small enough for all cores' pieces in memory."""
LONGEST_CHARS = 24_000_000
"""Length of the longest piece in characters.

The library `tokenizers` takes 115 to 140 bytes of memory a character of text, and up to 330 where every character is a
word (`benchmarks/results/long_documents.json`), so this is about 3 GB, and 8 GB at worst. Times are proportional to the
length. In runs of white space the libraries' matchers give up: tiktoken's after one million characters, that of
tokenizers after some millions (`explained_failures`).
"""

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_OLD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
QWEN = CL100K.replace("{1,3}", "")
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\"", '"')

# Of the tokenizers trained here: words with one leading sign, up to three digits, signs together with the line break
# and the indentation after them. On the standard library's source, at 4,096 tokens, this gives 3.71 bytes a token;
# GPT-2's pattern gives 3.36.
OURS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)*"
    r"|(?:[ \t]*\r?\n)+[ \t]*|\s+(?!\S)|\s+"
)

WORDS = frozenset({GPT2, GPT2_OLD, CL100K, CL100K_POSSESSIVE, QWEN, O200K, DEEPSEEK, OURS})
"""Patterns that the claim is proven for."""
NEUTRAL = frozenset({r"\p{N}", r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+"})
"""Patterns that may stand before one of `WORDS`."""

LETTERS = "A-Za-zぁ-ゖァ-ヺ一-龥가-힣"
SIGNS = r"\t\n\r !-&(-/:;?@\[-`{-~、。！？，：；「」（）"
BEFORE_SPACE = re.compile(r"\S(?= )")
BETWEEN_WORDS = re.compile(rf"\S(?= )|[0-9{LETTERS}](?=[{SIGNS}])|[{LETTERS}](?=[0-9])")


def cut_rule(inner: Any) -> re.Pattern[str] | None:
    """Return the pattern after whose matches `inner`, of the package `tokenizers`, may cut; None if none is proven."""
    added_tokens = inner.get_added_tokens_decoder().values()
    normalizer, pre_tokenizer = (
        None if part is None else json.loads(part.__getstate__())
        for part in (inner.normalizer, inner.pre_tokenizer)
    )
    if not _keeps_cuts(normalizer):
        return None
    stages = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    kinds = [_stage_kind(stage) for stage in stages]
    if "words" not in kinds or "unknown" in kinds:
        return None
    if any(t.lstrip or t.rstrip or t.single_word or BEFORE_SPACE.search(t.content) for t in added_tokens):
        return None
    return BEFORE_SPACE if any(not t.special for t in added_tokens) else BETWEEN_WORDS


def cut(text: str, rule: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """Yield `text` in pieces of at least `size` characters, but for the last; each ends at the next cut of `rule`.

    Raises:
        UserError: a piece is longer than `LONGEST_CHARS`.
    """
    start = 0
    while rule is not None and len(text) - start > size:
        found = rule.search(text, start + size - 1)
        if found is None:
            break
        yield _short_enough(text[start : found.end()], rule)
        start = found.end()
    yield _short_enough(text[start:], rule)


def _short_enough(piece: str, rule: re.Pattern[str] | None) -> str:
    """Refuse a piece that is too long; return it otherwise."""
    if len(piece) <= LONGEST_CHARS:
        return piece
    limit = f"the limit is {LONGEST_CHARS:,}, so that encoding fits in memory"
    if rule is None:
        raise UserError(
            f"a document has {len(piece):,} characters, and this tokenizer must encode it as one text, because cutting "
            f"it could change its tokens; {limit}. Split the document, or use a tokenizer that splits text into words "
            "by a known pattern (see docs/data-caches.md)."
        )
    raise UserError(
        f"a document has {len(piece):,} characters without a place where words certainly end, such as a space; "
        f"{limit}. If it is text, split it; if not, leave it out."
    )


@contextmanager
def explained_failures() -> Iterator[None]:
    """Turn a failure of a tokenizer library, in Rust a panic, which is no Exception here, into a UserError.

    Raises:
        UserError: the library gave up, say at a run of white space of millions of characters.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer's library gave up on a document: {error}. White space without anything else for a million "
            "characters or more does that: shorten such runs, or leave the document out"
        ) from None


def _keeps_cuts(normalizer: Any) -> bool:
    """Return whether a normalizer is NFC, or does nothing."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_keeps_cuts, normalizer["normalizers"]))


def _stage_kind(stage: Any) -> str:
    """Return what a pre-tokenizer does at a cut: it splits there (words), never across it (neutral), or is unknown."""
    if stage["type"] == "ByteLevel" and not stage["add_prefix_space"]:
        return "words" if stage.get("use_regex", True) else "neutral"
    if stage["type"] == "Digits":
        return "neutral"
    if stage["type"] == "Split":
        keeps_all = stage["behavior"] == "Isolated" or (stage["behavior"] == "Removed" and stage["invert"])
        pattern = stage["pattern"].get("Regex")
        if pattern in WORDS and keeps_all:
            return "words"
        if pattern in NEUTRAL and stage["behavior"] == "Isolated":
            return "neutral"
    return "unknown"
