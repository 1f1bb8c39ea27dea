"""The two passes over a unit of a corpus: its documents to a spool of clean text, and these to tokens.

Each pass writes a folder under a temporary name and renames it, so that a folder with its final name is complete and a
preparation that was killed goes on where it stopped. What a pass writes is a pure function of its arguments: the number
of processes and restarts leave no trace.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.data.clean.config import CleanStep
from megatrain.data.clean.report import CleaningReport
from megatrain.data.clean.steps import Cleaner
from megatrain.data.labels import Label, LabelSet
from megatrain.data.sources.corpus import Corpus, Part
from megatrain.data.sources.examples import RowExamples, Span
from megatrain.data.sources.labelled import RowLabels
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.split_writer import SplitWriter
from megatrain.data.store import EXAMPLE_PARTS, LABEL_PARTS, SPLIT_PARTS
from megatrain.data.tokenizer import Tokenizer

BATCH_CHARS = 8 << 20
"""Text given to the tokenizer at once: work for all cores, and bounded memory."""
FACTS = np.dtype([("size", "<i8"), ("chars", "<i8"), ("digest", "u1", 16), ("markup", "?")])
"""What the spool knows of a document: bytes and characters of its text, the beginning of the text's SHA-256, and
whether special tokens in it are meant as such."""
Advance = Callable[[float], None]
"""Called with the fraction of a unit that is done."""


class Spool(NamedTuple):
    """The documents of a unit between the passes, cleaned. `facts` `(documents,)` of type `FACTS`."""

    facts: np.ndarray
    names: list[str]
    answers: dict[int, list[Span]] | None
    """Spans of the answers by the document's number; None if the documents are no examples."""
    labels: list[Label] | None
    """Each document's label, or labels; None if they have none."""
    files: list[int]
    """Numbers of the files that gave documents."""
    left_out: LeftOut
    report: CleaningReport
    """What cleaning did to the documents of this unit."""
    directory: Path

    def fingerprints(self) -> np.ndarray:
        """Return what the cleaning steps of the whole corpus compare, `(documents, width)` uint8."""
        found: np.ndarray = np.load(self.directory / "fingerprints.npy")
        return found

    def text(self, number: int) -> str:
        """Return the text of one document."""
        only = np.zeros(len(self.facts), bool)
        only[number] = True
        return next(self.texts(only))[1]

    def texts(self, keep: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield number and text of each document that `keep` `(documents,)` marks."""
        with open(self.directory / "text", "rb") as stream:
            for number, size in enumerate(self.facts["size"].tolist()):
                if keep[number]:
                    yield number, stream.read(size).decode()
                else:
                    stream.seek(size, 1)


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the second pass does with the documents of a unit.

    `keep` and `held_out` `(documents,)` mark those that are used, and those of the validation split. `tail` is the
    document whose text from character `tail_start` on is held out, if there is one.
    """

    keep: np.ndarray
    held_out: np.ndarray
    tail: int | None = None
    tail_start: int = 0
    labels: LabelSet | None = None
    """What the documents are labelled with; None if they have no labels."""


def read_unit(
    corpus: Corpus,
    parts: list[Part],
    steps: tuple[CleanStep, ...],
    directory: Path,
    advance: Advance = lambda share: None,
) -> None:
    """Read the documents of `parts` into the spool `directory`, cleaned by `steps`.

    Raises:
        UserError: a file cannot be read, or does not contain text where it should.
    """
    left_out = LeftOut()
    cleaner, report = cleaner_of(steps), CleaningReport(steps)
    fingerprints: list[bytes] = []
    facts: list[tuple[int, int, bytes, bool]] = []
    names: list[str] = []
    answers: dict[int, list[Span]] | None = {} if isinstance(corpus.row_text, RowExamples) else None
    labels: list[Label] | None = [] if isinstance(corpus.row_text, RowLabels) else None
    files: set[int] = set()
    expected = sum(corpus.files[part.file].size for part in parts)
    done = 0
    with _completing(directory) as folder:
        with open(folder / "text", "wb") as stream:
            for part in parts:
                for document in corpus.documents(left_out, [part]):
                    files.add(part.file)
                    cleaned = cleaner.clean(document.text)
                    report.add(document.id, cleaned, document.text)
                    before, done = done, done + len(document.text)
                    if cleaned.text is not None:
                        content = cleaned.text.encode()
                        stream.write(content)
                        digest = hashlib.sha256(document.together.encode() or content).digest()[:16]
                        facts.append((len(content), len(cleaned.text), digest, document.markup))
                        if answers is not None and document.answers is not None:
                            answers[len(names)] = list(document.answers)
                        if labels is not None and document.label is not None:
                            labels.append(document.label)
                        names.append(document.id)
                        fingerprints.append(cleaner.fingerprint(cleaned.text))
                    if before >> 20 != done >> 20:
                        advance(min(1.0, done / max(1, expected)))
        np.save(folder / "facts.npy", _as_facts(facts))
        width = len(fingerprints[0]) if fingerprints else 0
        joined = np.frombuffer(b"".join(fingerprints), np.uint8).reshape(len(fingerprints), width)
        np.save(folder / "fingerprints.npy", joined)
        (folder / "report.pickle").write_bytes(pickle.dumps(report))
        described = {"names": names, "files": sorted(files), "left_out": left_out.as_json()}
        described["answers"] = None if answers is None else [*answers.items()]
        described["labels"] = labels
        (folder / "described.json").write_text(json.dumps(described), encoding="utf-8")


@lru_cache(maxsize=1)
def cleaner_of(steps: tuple[CleanStep, ...]) -> Cleaner:
    """Return the cleaner of `steps`, one for all units of a process: models and files are read once.

    Whoever begins another preparation clears this cache, since the files may have changed.
    """
    return Cleaner(steps)


def _as_facts(rows: list[tuple[int, int, bytes, bool]]) -> np.ndarray:
    found = np.zeros(len(rows), FACTS)
    for number, (size, chars, digest, markup) in enumerate(rows):
        found[number] = (size, chars, np.frombuffer(digest, np.uint8), markup)
    return found


def open_spool(directory: Path) -> Spool:
    """Open what `read_unit` wrote."""
    described = json.loads((directory / "described.json").read_text(encoding="utf-8"))
    left_out = LeftOut(described["left_out"])
    report = pickle.loads((directory / "report.pickle").read_bytes())
    facts = np.load(directory / "facts.npy")
    answers = None
    if described["answers"] is not None:
        answers = {number: [(begin, end) for begin, end in spans] for number, spans in described["answers"]}
    labels = described["labels"]
    if labels is not None:
        labels = [tuple(each) if isinstance(each, list) else each for each in labels]
    return Spool(facts, described["names"], answers, labels, described["files"], left_out, report, directory)


def encode_unit(
    spool: Path,
    encoding: Encoding,
    tokenizer: Tokenizer,
    directory: Path,
    advance: Advance = lambda share: None,
) -> None:
    """Write the tokens of a unit's documents, both splits, to `directory`.

    Raises:
        UserError: the tokenizer breaks its own vocabulary.
    """
    opened = open_spool(spool)
    sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    if opened.answers is not None:
        sizes["beside"] = EXAMPLE_PARTS if encoding.labels is None else LABEL_PARTS
    total = max(1, int(opened.facts["chars"][encoding.keep].sum()))
    chars = 0
    with _completing(directory) as folder:
        with SplitWriter(folder, "train", **sizes) as train, SplitWriter(folder, "val", **sizes) as val:
            for batch in _batches(_pieces(opened, encoding, tokenizer)):
                for piece, (ids, answers) in zip(batch, _encoded(batch, tokenizer), strict=True):
                    writer = val if piece.held_out else train
                    size = len(piece.text.encode())
                    writer.append(
                        ids,
                        text_bytes=size,
                        ends_document=piece.ends_document,
                        answers=answers,
                        row=piece.row,
                        label=piece.label,
                    )
                    chars += len(piece.text)
                advance(chars / total)
        (folder / "counts.json").write_text(json.dumps({"train": train.counts(), "val": val.counts()}))


class Piece(NamedTuple):
    """A part of a document that is encoded by itself."""

    held_out: bool
    text: str
    ends_document: bool
    markup: bool
    answers: list[Span] | None = None
    row: str = ""
    """Name of the row that an example was made of."""
    label: int | None = None
    """The document's label, or the bits of several."""


def _encoded(batch: list[Piece], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the tokens of each piece, and for an example which of them, and of the end, have a loss."""
    texts, markup = [piece.text for piece in batch], batch[0].markup
    if batch[0].answers is None:
        encode = tokenizer.encode_markup if markup else tokenizer.encode_batch
        yield from ((ids, None) for ids in encode(texts))
        return
    for piece, (ids, places) in zip(batch, tokenizer.encode_places(texts, markup=markup), strict=True):
        yield ids, tokens_within(places, piece.answers or [], length=len(piece.text))


def tokens_within(places: np.ndarray, spans: list[Span], *, length: int) -> np.ndarray:
    """Return which tokens have a character in one of `spans`, and at the end whether the end-of-text token is in one.

    Args:
        places: `(tokens, 2)` first character of each token and the one after its last. spans: disjoint, ascending.
        length: of the text, in characters.

    Returns `(tokens + 1,)` bool. The first token is in none: nothing predicts it.
    """
    begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    first, after = places.T
    nth = np.searchsorted(ends, first, side="right")  # the first span that ends behind the token's beginning
    found = np.append(begins, np.iinfo(np.int64).max)[nth] < after
    found &= first < after
    found[:1] = False
    return np.append(found, len(ends) > 0 and ends[-1] > length)


def _pieces(spool: Spool, encoding: Encoding, tokenizer: Tokenizer) -> Iterator[Piece]:
    for number, text in spool.texts(encoding.keep):
        if number == encoding.tail:
            cut = encoding.tail_start
            splits = [(False, text[:cut]), (True, text[cut:])]
        else:
            splits = [(bool(encoding.held_out[number]), text)]
        for held_out, content in splits:
            if content:
                markup = bool(spool.facts["markup"][number])
                if spool.answers is not None:
                    label = None
                    if encoding.labels is not None and spool.labels is not None:
                        label = encoding.labels.value(spool.labels[number])
                    yield Piece(
                        held_out,
                        content,
                        ends_document=True,
                        markup=markup,
                        answers=spool.answers[number],
                        row=spool.names[number],
                        label=label,
                    )
                    continue
                *front, last = [content] if markup else tokenizer.pieces(content)
                for piece in front:
                    yield Piece(held_out, piece, ends_document=False, markup=markup)
                yield Piece(held_out, last, ends_document=True, markup=markup)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in groups of about BATCH_CHARS characters, those with markup apart."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        if batch and piece.markup != batch[0].markup:
            yield batch
            batch, chars = [], 0
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@contextmanager
def _completing(directory: Path) -> Iterator[Path]:
    """Yield a folder beside `directory` to write to, which takes its name when all went well."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(directory)


def join_splits(folders: list[Path], directory: Path) -> dict[str, dict[str, Any]]:
    """Join the tokens that `encode_unit` wrote to `folders`, in order; return the counts of each split.

    A validation split of a single token is dropped, since it has no target.
    """
    totals: dict[str, dict[str, Any]] = {}
    counts = [json.loads((folder / "counts.json").read_text()) for folder in folders]
    for split in ("train", "val"):
        total = {"tokens": 0, "documents": 0, "text_bytes": 0}
        with (
            open(directory / f"{split}.tokens", "wb") as tokens,
            open(directory / f"{split}.documents", "wb") as documents,
        ):
            for folder, count in zip(folders, counts, strict=True):
                with open(folder / f"{split}.tokens", "rb") as source:
                    shutil.copyfileobj(source, tokens, 16 << 20)
                starts = np.fromfile(folder / f"{split}.documents", dtype="<i8")
                documents.write((starts + total["tokens"]).astype("<i8").tobytes())
                total = {key: total[key] + count[split][key] for key in total}
        for part in {*EXAMPLE_PARTS, *LABEL_PARTS}:
            if (folders[0] / f"{split}.{part}").is_file():
                with open(directory / f"{split}.{part}", "wb") as joined:
                    for folder in folders:
                        joined.write((folder / f"{split}.{part}").read_bytes())
        totals[split] = total
    if totals["val"]["tokens"] - totals["val"]["documents"] < 2:
        del totals["val"]
        for part in (*SPLIT_PARTS, *EXAMPLE_PARTS, *LABEL_PARTS):
            (directory / f"val.{part}").unlink(missing_ok=True)
    return totals
