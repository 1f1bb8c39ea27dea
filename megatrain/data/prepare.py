"""From a data config to tokens: find them in the cache, or list, hash and build them."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.build import Progress, build
from megatrain.data.cache import mark_used
from megatrain.data.clean.steps import identity
from megatrain.data.config import DataConfig
from megatrain.data.labels import LabelSet
from megatrain.data.sources.chat import Conversation, read_conversation
from megatrain.data.sources.corpus import Corpus, find_corpus
from megatrain.data.sources.examples import RowExamples
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.parts import Scan, scan, units
from megatrain.data.store import (
    FORMAT_VERSION,
    PATIENCE_S,
    SOURCES_FILE,
    SyntheticStore,
    TokenStore,
    build_once,
    cache_root,
    open_split,
    read_index,
    write_index,
)
from megatrain.data.tokenizer import ByteTokenizer, Tokenizer
from megatrain.data.tokenizer_files import load_tokenizer, tokenizer_files

RECIPE_VERSION = 2  # part of every cache key: increment it when the same input would give other tokens
CHAT_VERSION = 1  # likewise, for examples
HASHING_THREADS = 4


@dataclass(frozen=True, slots=True)
class Contents:
    """What was read to make the tokens."""

    origin: str
    files: int
    """Files that gave documents."""
    documents: int
    train_tokens: int
    val_tokens: int
    text_bytes: int
    """Size of the text in UTF-8 bytes, both splits together."""
    left_out: LeftOut
    """What was not read, and why."""
    cleaning: dict[str, Any] | None
    """What `data.clean` did (`CleaningReport.as_dict`); None without it."""

    def as_json(self) -> dict[str, Any]:
        """Return the contents as JSON."""
        fields = ("origin", "files", "documents", "train_tokens", "val_tokens", "text_bytes")
        return {name: getattr(self, name) for name in fields} | {
            "left_out": self.left_out.as_json(),
            "cleaning": self.cleaning,
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenized data, ready to be read.

    `token_bytes` `(vocab_size,)`: bytes of text per token id; all 0 for synthetic data.
    """

    train: TokenStore | SyntheticStore
    val: TokenStore | SyntheticStore | None
    tokenizer: Tokenizer
    fingerprint: str
    token_bytes: np.ndarray
    contents: Contents | None
    """None for synthetic data."""
    directory: Path | None
    """Where the tokens lie; None for synthetic data."""


def prepare(
    cfg: DataConfig,
    *,
    progress: Progress,
    vocab_size: int | None = None,
    patience_s: float = PATIENCE_S,
) -> Prepared:
    """Return the tokens of `cfg`, from the cache if they are there.

    Args:
        vocab_size: the model's; synthetic tokens are drawn from it, and a larger tokenizer is refused.
        patience_s: how long another process that prepares the same data may stand still.

    Raises:
        UserError: the input, the tokenizer or the cache directory is unusable, or something was left out although
            `cfg.on_skip` is `error`.
    """
    if cfg.kind == "synthetic":
        assert vocab_size is not None, "synthetic tokens are drawn from the model's vocabulary"
        return _synthetic(cfg, vocab_size)
    conversation = read_conversation(cfg.tokenizer)
    corpus = _corpus(cfg, conversation)
    if cfg.on_skip == "error":
        _refuse_left_out(corpus.origin, LeftOut(corpus.unlisted))
    root = cache_root(cfg.cache_dir)
    shortcut = (
        root / "shortcuts" / _key(cfg, conversation, corpus.stamp(), _stamp(tokenizer_files(cfg.tokenizer)))
    )
    directory = _follow(shortcut, root)
    if directory is None:
        is_settled = corpus.is_settled()
        directory = _find_or_build(cfg, conversation, corpus, root, progress, patience_s=patience_s)
        if is_settled:
            _write_shortcut(shortcut, directory)
    mark_used(directory)
    return _open(directory, corpus.origin, vocab_size, cfg.on_skip)


def _corpus(cfg: DataConfig, conversation: Conversation) -> Corpus:
    return find_corpus(
        cfg.path,
        text_field=cfg.text_field,
        template=cfg.template,
        encoding=cfg.encoding,
        conversation=conversation,
        answer=cfg.answer,
        label_field=cfg.label_field,
        kind=cfg.kind,
        images=cfg.images,
    )


def _synthetic(cfg: DataConfig, vocab_size: int) -> Prepared:
    train = SyntheticStore(vocab_size)
    return Prepared(
        train=train,
        val=SyntheticStore(vocab_size, seed=1) if cfg.val_fraction else None,
        tokenizer=ByteTokenizer(),
        fingerprint=train.fingerprint,
        token_bytes=np.zeros(vocab_size, dtype=np.int64),
        contents=None,
        directory=None,
    )


def _find_or_build(
    cfg: DataConfig,
    conversation: Conversation,
    corpus: Corpus,
    root: Path,
    progress: Progress,
    *,
    patience_s: float,
) -> Path:
    progress("reading", 0.0)
    tokenizer = [_content_digest(file) for file in tokenizer_files(cfg.tokenizer)]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing leaves the interpreter to others
        numbers = range(len(corpus.files))
        list(pool.map(corpus.check, numbers))
        scans = list(pool.map(partial(scan, corpus), numbers))
    content = [corpus.content_digest([each.digest for each in scans]), corpus.unlisted]
    directory = root / _key(cfg, conversation, content, tokenizer)
    if read_index(directory) is None and directory.exists():
        progress("building the damaged token cache again", 0.0)
    build_once(
        directory,
        lambda unfinished: _build(cfg, corpus, scans, unfinished, progress),
        waiting=lambda: progress("waiting for another process that prepares the same data", 0.0),
        patience_s=patience_s,
    )
    return directory


def _open(directory: Path, origin: str, vocab_size: int | None, on_skip: str) -> Prepared:
    index = read_index(directory)
    if index is None:
        raise UserError(f"the token cache {directory} was removed or damaged while in use; start again")
    contents = _contents(index, origin)
    if on_skip == "error":
        _refuse_left_out(origin, contents.left_out)
    tokenizer = load_tokenizer(directory / "tokenizer")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: must be at least the tokenizer's {tokenizer.vocab_size} tokens"
        )
    train = open_split(directory, "train", index)
    assert train is not None
    return Prepared(
        train=train,
        val=open_split(directory, "val", index),
        tokenizer=tokenizer,
        fingerprint=index["fingerprint"],
        token_bytes=np.load(directory / "token_bytes.npy"),
        contents=contents,
        directory=directory,
    )


def _refuse_left_out(origin: str, left_out: LeftOut) -> None:
    if left_out:
        raise UserError(
            f"data.on_skip=error, and of {origin} this would be left out: {left_out.details()}. Name what to read "
            "with a pattern or a list in data.path, or allow it with data.on_skip=warn"
        )


def _contents(index: dict[str, Any], origin: str) -> Contents:
    """Return what the index says; equal texts share a cache, so it doesn't know where these come from."""
    train = index["splits"]["train"]
    val = index["splits"].get("val", {"tokens": 0, "documents": 0, "text_bytes": 0})
    return Contents(
        origin=origin,
        files=index["files_read"],
        documents=index["documents_read"],
        train_tokens=train["tokens"],
        val_tokens=val["tokens"],
        text_bytes=train["text_bytes"] + val["text_bytes"],
        left_out=LeftOut(index["left_out"]),
        cleaning=index["cleaning"],
    )


def _build(cfg: DataConfig, corpus: Corpus, scans: list[Scan], directory: Path, progress: Progress) -> None:
    built = build(cfg, corpus, units(corpus, scans), directory, progress)
    if _corpus(cfg, read_conversation(cfg.tokenizer)).stamp() != corpus.stamp():
        raise UserError(f"{corpus.origin} was modified while it was being read; start again")
    built.tokenizer.save(directory / "tokenizer")
    np.save(directory / "token_bytes.npy", built.tokenizer.token_bytes())
    files = [
        {"path": file.path, "name": file.name, "size": file.size, "sha256": each.digest}
        for file, each in zip(corpus.files, scans, strict=True)
    ]
    (directory / SOURCES_FILE).write_text(json.dumps(files, indent=0), encoding="utf-8")
    write_index(
        directory,
        splits=built.splits,
        tokenizer_digest=built.tokenizer.digest(),
        metadata={
            "origin": corpus.origin,
            "vocab_size": built.tokenizer.vocab_size,
            "files_read": built.files,
            "documents_read": built.documents,
            "left_out": built.left_out.as_json(),
            "cleaning": built.cleaning.as_dict() if cfg.clean else None,
            **_facts_of_examples(corpus, built.labels),
            "made_from": {
                "path": cfg.path,
                "text": {"field": cfg.text_field, "template": cfg.template, "encoding": cfg.encoding},
                "clean": identity(cfg.clean),
                "val_fraction": cfg.val_fraction,
                "tokenizer": asdict(cfg.tokenizer),
                "version": version("megatrain"),
            },
        },
    )


def _facts_of_examples(corpus: Corpus, labels: LabelSet | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if labels is not None:
        facts |= {"labels": labels.names, "multi_label": labels.is_multi}
    if isinstance(corpus.row_text, RowExamples) and corpus.row_text.per_row > 1:
        facts["together"] = corpus.row_text.per_row
    return facts


def _key(cfg: DataConfig, conversation: Conversation, content: object, tokenizer_content: object) -> str:
    """Return the name of a cache entry: a digest of everything that determines its bytes."""
    tokenizer = cfg.tokenizer
    bpe_size = tokenizer.vocab_size if tokenizer.kind == "bpe" else None
    recipe = [RECIPE_VERSION, FORMAT_VERSION, cfg.path is None, cfg.val_fraction]
    text: list[object] = [
        cfg.text_field,
        cfg.template,
        cfg.encoding,
        conversation.source,
        identity(cfg.clean),
    ]
    text += ["chat", CHAT_VERSION, cfg.answer] if cfg.kind == "chat" else []
    text += [cfg.kind, CHAT_VERSION, cfg.label_field] if cfg.kind in ("preferences", "classify") else []
    text += [cfg.kind, CHAT_VERSION, asdict(cfg.images)] if cfg.kind == "images" else []
    parts = [*recipe, *text, tokenizer.kind, bpe_size, content, tokenizer_content]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stamp(files: list[Path]) -> list[tuple[str, int, int, int]]:
    """Return names, sizes and times of `files`; equal stamps mean equal content."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def _content_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _follow(shortcut: Path, root: Path) -> Path | None:
    """Return the data set that the same file listing led to last time, if it is still complete."""
    try:
        directory = root / shortcut.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return directory if read_index(directory) is not None else None


def _write_shortcut(shortcut: Path, directory: Path) -> None:
    """Record which data set a file listing led to. A failure is harmless: hashing the content finds it too."""
    unfinished = shortcut.with_name(f"{shortcut.name}.{os.getpid()}")
    with suppress(OSError):
        shortcut.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(directory.name, encoding="utf-8")
        unfinished.replace(shortcut)
