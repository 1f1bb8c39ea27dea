"""What a step makes of one document."""

from dataclasses import dataclass

EXCERPT_CHARS = 80
"""Length of the excerpts in reports."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The removal of a document: why, in words that many documents share, and an excerpt that shows it."""

    reason: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Change:
    """A change that the step at index `step` made, with excerpts of the text before and after it."""

    step: int
    kind: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A document after the steps that see one document at a time.

    `text` is None if the step `removed_by` removed it, because of `reason`; `excerpt` shows why. `sizes` are the
    text's UTF-8 bytes after each step that it passed.
    """

    text: str | None
    removed_by: str | None
    reason: str | None
    excerpt: str
    changes: tuple[Change, ...]
    sizes: tuple[int, ...]

    @property
    def changed_by(self) -> tuple[str, ...]:
        """Kinds of the steps that changed the text, in their order."""
        return tuple(change.kind for change in self.changes)


def excerpt(text: str, around: int = 0) -> str:
    """Return a short stretch of `text` that begins shortly before the character `around`."""
    start = max(0, min(around - EXCERPT_CHARS // 4, len(text) - EXCERPT_CHARS))
    return text[start : start + EXCERPT_CHARS]


def first_difference(a: str, b: str) -> int:
    """Return the index of the first character in which two texts differ, the shorter one's length if none does."""
    low, high = 0, 64
    end = min(len(a), len(b))
    while high < end and a[low:high] == b[low:high]:
        low, high = high, 2 * high
    high = min(high, end)
    while low < high:  # a[:low] == b[:low]; the difference is in front of `high`, or there
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def size_of(text: str) -> int:
    """Return the text's size in UTF-8 bytes; lone surrogates count three each."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def percent(fraction: float) -> str:
    """Return a threshold as it is written in reasons."""
    return f"{100 * fraction:g} %"
