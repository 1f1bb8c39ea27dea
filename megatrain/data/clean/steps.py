"""The steps of `data.clean` in order: what they make of one document, and what identifies them in a cache."""

import unicodedata
from collections.abc import Callable
from functools import partial

from megatrain.config.load import dump
from megatrain.data.clean.config import (
    CleanStep,
    CorpusStep,
    DecontaminateStep,
    FixTextStep,
    HtmlStep,
    LanguageStep,
    NormalizeStep,
    PiiStep,
    QualityStep,
    RepetitionStep,
    Text8Step,
)
from megatrain.data.clean.decontaminate import Benchmarks, digests
from megatrain.data.clean.duplicates import Fingerprinter
from megatrain.data.clean.libraries import html_extractor, language_filter, text_fixer
from megatrain.data.clean.normalize import normalize
from megatrain.data.clean.outcome import (
    Change,
    Cleaned,
    Refusal,
    excerpt,
    first_difference,
    size_of,
)
from megatrain.data.clean.packages import versions
from megatrain.data.clean.pii import mask
from megatrain.data.clean.quality import apply_rules
from megatrain.data.clean.repetition import too_repetitive
from megatrain.data.clean.text8 import text8
from megatrain.data.clean.words import WordHashes

VERSIONS = {
    "fix_text": 1,
    "normalize": 1,
    "html": 1,
    "language": 1,
    "quality": 1,
    "repetition": 1,
    "pii": 1,
    "text8": 1,
    "decontaminate": 1,
    "exact_duplicates": 1,
    "near_duplicates": 1,
}
"""Version of each step's own code: raise it when the same text would come out differently."""
Apply = Callable[[str], str | Refusal | None]
"""One step: the new text, or a refusal; None leaves the text as it is."""


class Cleaner:
    """The steps that see one document at a time, made once in each process.

    `clean` and `fingerprint` are pure functions of the text: the same in every process and in any order.
    """

    def __init__(self, steps: tuple[CleanStep, ...]) -> None:
        """Import the libraries of `steps`, and read the files of benchmarks.

        Raises:
            UserError: a library is missing, or a file is unusable.
        """
        hashes = WordHashes()
        self._steps = [
            (index, step.kind, _prepared(step, hashes))
            for index, step in enumerate(steps)
            if not isinstance(step, CorpusStep)
        ]
        self._fingerprint = Fingerprinter(steps, hashes)

    def clean(self, text: str) -> Cleaned:
        """Return the document that the steps leave of `text`, with what they did."""
        changes: list[Change] = []
        sizes: list[int] = []
        size = size_of(text)
        for index, kind, apply in self._steps:
            found = apply(text)
            if isinstance(found, str) and not found:
                found = Refusal("nothing was left", excerpt(text))
            if isinstance(found, Refusal):
                return Cleaned(None, kind, found.reason, found.excerpt, tuple(changes), tuple(sizes))
            if found is not None and found != text:
                at = first_difference(text, found)
                changes.append(Change(index, kind, excerpt(text, at), excerpt(found, at)))
                text, size = found, size_of(found)
            sizes.append(size)
        return Cleaned(text, None, None, "", tuple(changes), tuple(sizes))

    def fingerprint(self, text: str) -> bytes:
        """Return what the corpus steps compare, `duplicates.width(steps)` bytes; b"" where there are none."""
        return self._fingerprint(text)


def identity(steps: tuple[CleanStep, ...]) -> list[object]:
    """Return what decides how `steps` clean a text, as JSON values: equal identities, equal results.

    Of each step: its values, the version of its code, those of its libraries and of Unicode's tables, and the content
    of its files.

    Raises:
        UserError: a library is missing, or a file cannot be read.
    """
    found: list[object] = []
    for step in steps:
        described = dump(step)
        if isinstance(step, DecontaminateStep):
            described["against"] = digests(step)  # wherever the files lie
        found.append(
            {
                "step": described,
                "version": VERSIONS[step.kind],
                "libraries": versions(step.kind) | {"unicode": unicodedata.unidata_version},
            }
        )
    return found


def _prepared(step: CleanStep, hashes: WordHashes) -> Apply:
    """Return one step as a function of a text."""
    if isinstance(step, FixTextStep):
        return text_fixer(step)
    if isinstance(step, NormalizeStep):
        return partial(normalize, form=step.form)
    if isinstance(step, HtmlStep):
        return html_extractor(step)
    if isinstance(step, LanguageStep):
        return language_filter(step)
    if isinstance(step, QualityStep):
        return partial(apply_rules, step.rules)
    if isinstance(step, RepetitionStep):
        return partial(too_repetitive, step, hashes=hashes)
    if isinstance(step, PiiStep):
        return partial(mask, kinds=step.mask)
    if isinstance(step, DecontaminateStep):
        return Benchmarks(step, hashes).hit
    assert isinstance(step, Text8Step)
    return text8
