"""The making of a data set from a corpus: read and clean, choose, train the tokenizer, encode, join.

Reading and encoding work unit by unit, in several processes when there is much to do. Between them this process decides
what concerns the corpus as a whole: which documents are duplicates, which are held out.
"""

import hashlib
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.clean.config import CorpusStep
from megatrain.data.clean.duplicates import find_duplicates
from megatrain.data.clean.report import CleaningReport
from megatrain.data.config import LABELLED, DataConfig
from megatrain.data.labels import LabelSet, label_set
from megatrain.data.sources.corpus import Corpus, Part
from megatrain.data.sources.examples import FORMS
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import TEXT_HINT
from megatrain.data.sources.preferences import FORMS as PAIRS
from megatrain.data.store import UnfinishedError
from megatrain.data.tokenizer import PixelTokenizer, Tokenizer, train_bpe
from megatrain.data.tokenizer_files import load_tokenizer, read_tokenizer
from megatrain.data.units import Encoding, Spool, cleaner_of, encode_unit, join_splits, open_spool, read_unit

Progress = Callable[[str, float], None]
"""Progress callback: the name of a phase and its completed fraction, 0 to 1."""
PARALLEL_BYTES = 256 << 20
"""From this size of the sources on, `data.workers=auto` means a process per core; below, starting them costs more."""
FORMS_OF = {
    "chat": FORMS,
    "preferences": PAIRS,
    "images": "an image is in a folder with the name of its class",
    "classify": "a row has a text (data.text_field or data.template) and a label (data.label_field)",
}
"""Of each kind of data whose documents are examples, what a row must be."""
PIECE_CHARS = 1 << 20  # the tokenizer's training text is taken in pieces of at most this
TRAIN_CHARS = 128 << 20  # a tokenizer is trained on at most about this much text, spread over the corpus


@dataclass(frozen=True, slots=True)
class Built:
    """What was made, besides the files."""

    splits: dict[str, dict[str, Any]]
    tokenizer: Tokenizer
    files: int
    """Files that gave documents."""
    documents: int
    """Documents used."""
    left_out: LeftOut
    cleaning: CleaningReport
    labels: LabelSet | None
    """What the documents are labelled with; None if they have no labels."""


def build(
    cfg: DataConfig, corpus: Corpus, units: list[tuple[list[Part], int]], directory: Path, progress: Progress
) -> Built:
    """Write the tokens of the corpus to `directory`, going on with what an earlier attempt left there.

    Raises:
        UserError: the corpus holds too little text, or text that can't be read.
        UnfinishedError: a process that worked on it died.
    """
    cleaner_of.cache_clear()
    work = directory / "work"
    work.mkdir(exist_ok=True)
    crew = _Crew(cfg, sum(size for _, size in units))
    spools = [work / f"read-{number:06}" for number in range(len(units))]
    crew.each(
        read_unit,
        [(corpus, parts, cfg.clean, spool) for (parts, _), spool in zip(units, spools, strict=True)],
        [size for _, size in units],
        lambda share: progress("reading", share),
    )
    left_out = LeftOut(corpus.unlisted)
    cleaning = CleaningReport(cfg.clean)
    encodings, chars = _choose(cfg, corpus, spools, left_out, cleaning)
    labels = _labels(spools) if cfg.kind in LABELLED else None
    encodings = [replace(each, labels=labels) for each in encodings]
    tokenizer = _tokenizer(cfg, spools, encodings, chars, work / "tokenizer", progress)
    folders = [work / f"tokens-{number:06}" for number in range(len(units))]
    crew.each(
        encode_unit,
        [(s, e, tokenizer, f) for s, e, f in zip(spools, encodings, folders, strict=True)],
        chars,
        lambda share: progress("tokenizing", share),
    )
    splits = join_splits(folders, directory)
    files = len({file for spool in spools for file in open_spool(spool).files})
    documents = sum(int(each.keep.sum()) for each in encodings)
    train_tokens = splits["train"]["tokens"] - splits["train"]["documents"]
    if train_tokens < 2:
        raise UserError(
            f"{corpus.origin} has too little text: {train_tokens} training tokens, but at least 2 are needed"
        )
    shutil.rmtree(work)
    return Built(splits, tokenizer, files, documents, left_out, cleaning, labels)


def _labels(spools: list[Path]) -> LabelSet:
    """Return the labels of all units' documents.

    Raises:
        UserError: they can't be told apart.
    """
    return label_set(label for spool in spools for label in open_spool(spool).labels or ())


def _choose(
    cfg: DataConfig, corpus: Corpus, spools: list[Path], left_out: LeftOut, cleaning: CleaningReport
) -> tuple[list[Encoding], list[int]]:
    """Return what is encoded of each unit, and how many characters; add what is not to `left_out` and `cleaning`.

    The held-out split is chosen by a hash of each document's text, so that it does not depend on names or order and
    equal documents fall on one side. When that leaves one side empty (one document, or few), the tail of the longest
    document is held out instead: its last `val_fraction`, from the next line start on.
    """
    found: list[Encoding] = []
    chars: list[int] = []
    seen: set[bytes] = set()
    longest = (0, 0, 0)  # characters, unit, document
    masks = _without_duplicates(cfg, spools, cleaning)
    for unit, (directory, keep) in enumerate(zip(spools, masks, strict=True)):
        spool = open_spool(directory)
        left_out.merge(spool.left_out)
        if corpus.is_stdlib and not cfg.clean:
            _mark_duplicates(spool, keep, seen, left_out)
        found.append(Encoding(keep, held_out_mask(spool.facts["digest"], cfg.val_fraction)))
        sizes = np.where(keep, spool.facts["chars"], 0)
        chars.append(int(sizes.sum()))
        if len(sizes) and sizes.max() > longest[0]:
            longest = (int(sizes.max()), unit, int(sizes.argmax()))
    documents = sum(int(each.keep.sum()) for each in found)
    if not documents:
        if cleaning.documents_in:
            raise UserError(
                f"{corpus.origin}: data.clean removed every document.\n  " + "\n  ".join(cleaning.lines())
            )
        if cfg.kind in FORMS_OF:
            raise UserError(
                f"{corpus.origin} gives no examples (left out: {left_out.details() or 'nothing'}): {FORMS_OF[cfg.kind]}"
            )
        raise UserError(
            f"{corpus.origin} contains no text (left out: {left_out.details() or 'nothing'}). {TEXT_HINT} Of rows, "
            "data.text_field says which field holds the text."
        )
    held = sum(int((each.keep & each.held_out).sum()) for each in found)
    if cfg.val_fraction > 0 and held in (0, documents) and cfg.kind in FORMS_OF:
        return _with_one_held_out(found, spools), chars
    if cfg.val_fraction > 0 and held in (0, documents):
        _, unit, number = longest
        text = open_spool(spools[unit]).text(number)
        nothing = [Encoding(each.keep, np.zeros_like(each.keep)) for each in found]
        nothing[unit] = Encoding(
            found[unit].keep, nothing[unit].held_out, number, tail_start(text, cfg.val_fraction)
        )
        found = nothing
    return found, chars


def _with_one_held_out(found: list[Encoding], spools: list[Path]) -> list[Encoding]:
    """Hold out the examples with the least digest, since examples are not cut; none if all have the same."""
    digests = [open_spool(spool).facts["digest"] for spool in spools]
    least = np.frombuffer(min(row.tobytes() for every in digests for row in every), np.uint8)
    masks = [(every == least).all(1) for every in digests]
    if all(mask.all() for mask in masks):
        masks = [np.zeros_like(mask) for mask in masks]
    return [Encoding(each.keep, mask) for each, mask in zip(found, masks, strict=True)]


def _without_duplicates(cfg: DataConfig, spools: list[Path], cleaning: CleaningReport) -> list[np.ndarray]:
    """Return which documents of each unit the cleaning steps of the whole corpus keep; add what they did to `cleaning`.

    Holds names, sizes and fingerprints of all documents in memory: about 100 bytes each, and those of the fingerprint.
    """
    opened = [open_spool(spool) for spool in spools]
    for spool in opened:
        cleaning.merge(spool.report)
    masks = [np.ones(len(spool.facts), bool) for spool in opened]
    if not any(isinstance(step, CorpusStep) for step in cfg.clean) or not any(map(len, masks)):
        return masks
    starts = np.cumsum([0, *map(len, masks)])
    removed = find_duplicates(np.concatenate([s.fingerprints() for s in opened if len(s.facts)]), cfg.clean)

    def text_of(document: int) -> str:
        unit = int(np.searchsorted(starts, document, side="right")) - 1
        return opened[unit].text(document - int(starts[unit]))

    names = [name for spool in opened for name in spool.names]
    sizes = np.concatenate([spool.facts["size"] for spool in opened])
    cleaning.add_duplicates(removed, ids=names, sizes=sizes, text_of=text_of)
    keep = np.ones(len(names), bool)
    keep[removed.documents] = False
    return np.split(keep, starts[1:-1])


def _mark_duplicates(spool: Spool, keep: np.ndarray, seen: set[bytes], left_out: LeftOut) -> None:
    for number, fact in enumerate(spool.facts):
        digest = fact["digest"].tobytes()
        if digest in seen:
            keep[number] = False
            left_out.add_document(spool.names[number], "duplicate", int(fact["size"]))
        seen.add(digest)


def held_out(text: str, val_fraction: float) -> bool:
    """Return whether the document `text` belongs to the validation split."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint8)
    return bool(held_out_mask(digest[None], val_fraction)[0])


def held_out_mask(digests: np.ndarray, val_fraction: float) -> np.ndarray:
    """Return which documents belong to the validation split, from the beginnings of their SHA-256 `(documents, 16)`."""
    heads = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
    limit = math.ceil(val_fraction * 2.0**64)
    return heads < np.uint64(limit)


def tail_start(text: str, val_fraction: float) -> int:
    """Return the index at which the held-out tail of a document starts: the next line start, if one is near."""
    cut = len(text) - int(len(text) * val_fraction)
    line = text.find("\n", cut - 1) + 1
    return line if 0 < line <= (cut + len(text)) // 2 else cut


def _tokenizer(
    cfg: DataConfig,
    spools: list[Path],
    encodings: list[Encoding],
    chars: list[int],
    saved: Path,
    progress: Progress,
) -> Tokenizer:
    """Return the tokenizer: read, trained, or trained by an earlier attempt."""
    if cfg.kind == "images":
        return PixelTokenizer()
    if cfg.tokenizer.kind != "bpe":
        return read_tokenizer(cfg.tokenizer)
    if saved.exists():
        return load_tokenizer(saved)
    assert cfg.tokenizer.vocab_size != "auto"
    sample = _training_sample(spools, encodings, sum(chars), progress)
    tokenizer = train_bpe(sample, vocab_size=cfg.tokenizer.vocab_size)
    unfinished = saved.with_name("tokenizer.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save(unfinished)
    unfinished.rename(saved)
    return tokenizer


def _training_sample(
    spools: list[Path], encodings: list[Encoding], chars: int, progress: Progress
) -> Iterator[str]:
    """Yield training text for a tokenizer: all of it, or pieces spread evenly over it."""
    share = min(1.0, TRAIN_CHARS / max(1, chars))
    seen = taken = 0
    for directory, encoding in zip(spools, encodings, strict=True):
        for number, text in open_spool(directory).texts(encoding.keep):
            used = text[: encoding.tail_start] if number == encoding.tail else text
            for start in range(0, len(used), PIECE_CHARS):
                piece = used[start : start + PIECE_CHARS]
                seen += len(piece)
                progress("training the tokenizer", min(1.0, seen / chars))
                if not encoding.held_out[number] and taken <= seen * share:
                    taken += len(piece)
                    yield piece
    progress("training the tokenizer", 1.0)


class _Crew:
    """The processes that work on units: this one alone, or a pool of `data.workers`."""

    def __init__(self, cfg: DataConfig, size: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        automatic = cores if size >= PARALLEL_BYTES else 1
        self._workers = automatic if cfg.workers == "auto" else cfg.workers

    def each(
        self,
        task: Callable[..., None],
        calls: list[tuple[Any, ...]],
        sizes: list[int],
        advance: Callable[[float], None],
    ) -> None:
        """Do `task` for every call whose last argument, the folder it writes, isn't there; `sizes` weigh progress."""
        total = max(1, sum(sizes))
        done = sum(size for call, size in zip(calls, sizes, strict=True) if call[-1].exists())
        left = [(call, size) for call, size in zip(calls, sizes, strict=True) if not call[-1].exists()]
        advance(done / total)
        if self._workers == 1 or len(left) < 2:
            for call, size in left:
                task(*call, lambda share, done=done, size=size: advance((done + share * size) / total))
                done += size
        else:
            self._in_parallel(task, left, lambda more: advance((done + more) / total))
        advance(1.0)

    def _in_parallel(
        self,
        task: Callable[..., None],
        left: list[tuple[tuple[Any, ...], int]],
        advance: Callable[[int], None],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        finished = 0
        with ProcessPoolExecutor(min(self._workers, len(left)), context, initializer=_begin_worker) as pool:
            waiting: dict[Future[None], int] = {}
            try:
                queue = iter(left)
                while True:
                    while len(waiting) < 2 * self._workers and (following := next(queue, None)):
                        waiting[pool.submit(task, *following[0])] = following[1]
                    if not waiting:
                        return
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        future.result()
                        finished += waiting.pop(future)
                        advance(finished)
            except BrokenProcessPool:
                raise UnfinishedError(
                    "a process that prepares the data died, as happens when memory runs out; the same command goes on "
                    "where this one stopped. Fewer processes need less memory: data.workers=1"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave one core to each process, before the tokenizer's library starts its threads."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
