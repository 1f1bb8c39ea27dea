"""What cleaning did to a corpus: counts per step and reason, bytes, and a few samples to look at."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from megatrain.data.clean.config import CleanStep
from megatrain.data.clean.duplicates import Removed
from megatrain.data.clean.outcome import Cleaned, excerpt, first_difference, size_of

SAMPLES = 3
"""Samples of each step: the first documents that it removed, and the first that it changed."""


@dataclass(slots=True)
class Sample:
    """One document that a step removed or changed. `after` is empty for a removed one, but for a duplicate, of which
    it is the document that is kept."""

    document: str
    what: str
    before: str
    after: str = ""


@dataclass(slots=True)
class StepCounts:
    """What one step did. Sizes are UTF-8 bytes."""

    kind: str
    documents: int = 0
    changed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    removed_samples: list[Sample] = field(default_factory=list)
    changed_samples: list[Sample] = field(default_factory=list)

    def merge(self, later: "StepCounts") -> None:
        """Add the counts of documents that come later in the corpus."""
        self.documents += later.documents
        self.changed += later.changed
        self.bytes_before += later.bytes_before
        self.bytes_after += later.bytes_after
        self.removed += later.removed
        self.removed_samples = (self.removed_samples + later.removed_samples)[:SAMPLES]
        self.changed_samples = (self.changed_samples + later.changed_samples)[:SAMPLES]


class CleaningReport:
    """Counts of all steps over a corpus, or over a part of it.

    Reports of consecutive parts, merged in the corpus's order, are the report of the whole, however it was cut.
    """

    def __init__(self, steps: tuple[CleanStep, ...]) -> None:
        self.steps = [StepCounts(step.kind) for step in steps]
        self.documents_in = self.documents_out = self.bytes_in = self.bytes_out = 0

    def add(self, document_id: str, cleaned: Cleaned, text: str) -> None:
        """Count one document; `text` is what it was before the first step."""
        self.documents_in += 1
        size = size_of(text)
        self.bytes_in += size
        for counts, after in zip(self.steps, cleaned.sizes, strict=False):
            counts.documents += 1
            counts.bytes_before += size
            counts.bytes_after += after
            size = after
        for change in cleaned.changes:
            counts = self.steps[change.step]
            counts.changed += 1
            if len(counts.changed_samples) < SAMPLES:
                sample = Sample(document_id, "changed", printable(change.before), printable(change.after))
                counts.changed_samples.append(sample)
        if cleaned.text is not None:
            self.documents_out += 1
            self.bytes_out += size
            return
        assert cleaned.reason is not None
        counts = self.steps[len(cleaned.sizes)]
        counts.documents += 1
        counts.bytes_before += size
        counts.removed[cleaned.reason] += 1
        if len(counts.removed_samples) < SAMPLES:
            counts.removed_samples.append(Sample(document_id, cleaned.reason, printable(cleaned.excerpt)))

    def add_duplicates(
        self, removed: Removed, *, ids: Sequence[str], sizes: np.ndarray, text_of: Callable[[int], str]
    ) -> None:
        """Count what `find_duplicates` found over the documents that the other steps left.

        Args:
            ids: name of each document, by its index in the fingerprints.
            sizes: (documents,) bytes of each cleaned document.
            text_of: the cleaned text of a document; asked for the samples only.
        """
        total = int(np.sum(sizes))
        for index, seen in removed.seen.items():
            counts, chosen = self.steps[index], removed.steps == index
            gone = removed.documents[chosen]
            lost = int(np.sum(np.asarray(sizes)[gone]))
            counts.documents += seen
            counts.bytes_before += total
            total -= lost
            counts.bytes_after += total
            how = "equal" if counts.kind == "exact_duplicates" else "similar"
            what = f"{how} to an earlier document"
            if len(gone):
                counts.removed[what] += len(gone)
            for document, kept in zip(gone[:SAMPLES], removed.kept[chosen][:SAMPLES], strict=True):
                if len(counts.removed_samples) < SAMPLES:
                    texts = text_of(int(document)), text_of(int(kept))
                    at = first_difference(*texts)
                    shown = [printable(excerpt(text, at)) for text in texts]
                    if texts[0] == texts[1]:
                        shown = [printable(excerpt(texts[0]))]
                    what_of = f"{what}; {ids[kept]} is kept"
                    counts.removed_samples.append(Sample(ids[document], what_of, *shown))
            self.documents_out -= len(gone)
            self.bytes_out -= lost

    def merge(self, later: "CleaningReport") -> None:
        """Add the report of documents that come later in the corpus."""
        for own, other in zip(self.steps, later.steps, strict=True):
            own.merge(other)
        self.documents_in += later.documents_in
        self.documents_out += later.documents_out
        self.bytes_in += later.bytes_in
        self.bytes_out += later.bytes_out

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "documents_in": self.documents_in,
            "documents_out": self.documents_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "steps": [
                {
                    "kind": step.kind,
                    "documents": step.documents,
                    "removed": dict(_by_count(step.removed)),
                    "changed": step.changed,
                    "bytes_before": step.bytes_before,
                    "bytes_after": step.bytes_after,
                    "samples": [
                        {each.name: getattr(sample, each.name) for each in fields(sample)}
                        for sample in step.removed_samples + step.changed_samples
                    ],
                }
                for step in self.steps
            ],
        }

    def lines(self) -> list[str]:
        """Return the report as lines to print, at most about 120 characters each."""
        return report_lines(self.as_dict())


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines of a report from its JSON values (`CleaningReport.as_dict`)."""
    found = [
        f"Cleaning kept {report['documents_out']:,} of {report['documents_in']:,} documents, "
        f"{report['bytes_out']:,} of {report['bytes_in']:,} bytes."
    ]
    for step in report["steps"]:
        gone = sum(step["removed"].values())
        found.append(
            f"{step['kind']}: {step['documents']:,} documents, {gone:,} removed, {step['changed']:,} changed, "
            f"{step['bytes_before']:,} -> {step['bytes_after']:,} bytes"
        )
        found += [f"  {count:,} {reason}" for reason, count in step["removed"].items()]
        for sample in step["samples"]:
            found.append(f"  {sample['document']}: {sample['what']}")
            found += [f"    | {text}" for text in (sample["before"], sample["after"]) if text]
    return found


def printable(text: str) -> str:
    """Return `text` with characters that cannot be printed written as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _by_count(removed: Counter[str]) -> list[tuple[str, int]]:
    """Return reasons with their numbers, the most frequent first, by name where they are equal."""
    return sorted(removed.items(), key=lambda item: (-item[1], item[0]))
