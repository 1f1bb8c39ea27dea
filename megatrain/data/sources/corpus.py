"""A corpus: the files that `data.path` names, and the documents in them.

A corpus is listed (names, sizes and times only) by `find_corpus`; its text is read by `Corpus.documents`, any number of
times and always in the same order. Every user mistake raises a `UserError` that names the file.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from megatrain.config.errors import UserError
from megatrain.data.config import ImagesConfig
from megatrain.data.sources.archives import read_tar, read_zip
from megatrain.data.sources.chat import PARAGRAPHS, Conversation
from megatrain.data.sources.columnar import read_arrow, read_parquet
from megatrain.data.sources.examples import RowExamples
from megatrain.data.sources.formats import (
    SNIFF_BYTES,
    UNREAD,
    Format,
    format_of,
    full_suffix,
    is_text,
    suffix_of,
)
from megatrain.data.sources.images import ImageRows, digits_file
from megatrain.data.sources.labelled import RowLabels
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import TEXT_HINT, SourceFile, accessible, list_path, list_stdlib
from megatrain.data.sources.preferences import RowPairs
from megatrain.data.sources.readers import Document, Reader, read_csv, read_json, read_jsonl, read_text
from megatrain.data.sources.rows import RowText
from megatrain.data.sources.stdlib import read_python
from megatrain.data.sources.streams import CHUNK, Window, decompressed, open_bytes

CLOCK_TICK_NS = 50_000_000  # file systems round times to 10 ms or less; the rest is margin


class Part(NamedTuple):
    """A file of the corpus, or a part of it: row groups of Parquet or bytes of JSON lines, `begin` to `end`.

    `rows_before` is the number of rows in front of it. `end` 0 means the whole file.
    """

    file: int
    begin: int = 0
    end: int = 0
    rows_before: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of a corpus, sorted by name, and how to read them. `origin` is its description in messages."""

    origin: str
    files: tuple[SourceFile, ...]
    row_text: RowText
    encoding: str = "auto"
    is_stdlib: bool = False
    is_single_file: bool = False
    unlisted: tuple[dict[str, Any], ...] = field(default=())
    """What the listing left out (`LeftOut.as_json`)."""

    def stamp(self) -> str:
        """Return a digest of paths, sizes and times; equal stamps mean equal content, without reading it."""
        listing = [(f.path, f.size, *f.stamp) for f in self.files]
        return hashlib.sha256(json.dumps([listing, self.unlisted]).encode()).hexdigest()

    def is_settled(self) -> bool:
        """Return whether the last change is old enough that another one would change a file's times."""
        newest = max((max(f.times(), default=0) for f in self.files), default=0)
        return newest < time.time_ns() - CLOCK_TICK_NS

    def content_digest(self, digests: list[str]) -> str:
        """Return a digest of the corpus from those of its files, in order, independent of where they lie."""
        named = ((digest, full_suffix(file.name)) for digest, file in zip(digests, self.files, strict=True))
        return hashlib.sha256(json.dumps([*named]).encode()).hexdigest()

    def documents(
        self, left_out: LeftOut | None = None, parts: list[Part] | None = None
    ) -> Iterator[Document]:
        """Yield all documents in the order of the files, or those of `parts`, without empty ones.

        What is not read is added to `left_out`. The standard library's source is cleaned; other text is unchanged
        except for a leading byte-order mark, which is dropped.

        Raises:
            UserError: a file cannot be read, or does not contain text where it should.
        """
        left_out = LeftOut() if left_out is None else left_out
        reader = Reader(self.row_text, self.encoding, left_out, self.is_single_file)
        for part in parts or map(Part, range(len(self.files))):
            file = self.files[part.file]
            if part.end:
                yield from _read_part(file, part, reader)
                continue
            before, found = left_out.total(), 0
            for document in self._read_file(file, reader):
                found += 1
                yield document
            if not found and left_out.total() == before:
                left_out.add_file(file.name, "empty", file.size)  # a shard without rows

    def check(self, number: int) -> None:
        """Read the first row of a file of rows, so that a wrong field is named before hours of work and not after.

        Raises:
            UserError: the file is damaged at its beginning, or its rows lack the field.
        """
        file = self.files[number]
        if not self.is_stdlib and format_of(file.name) in ("jsonl", "csv", "tsv", "parquet", "arrow"):
            next(
                self._read_file(file, Reader(self.row_text, self.encoding, LeftOut(), self.is_single_file)),
                None,
            )

    def _read_file(self, file: SourceFile, reader: Reader) -> Iterator[Document]:
        if self.is_stdlib:
            yield from read_python(file, reader.left_out)
        elif isinstance(self.row_text, ImageRows) and format_of(file.name) not in ("tar", "zip"):
            with open_bytes(file) as stream, accessible(file.path):
                yield from self.row_text.read(stream, file, reader.left_out)
        else:
            with open_bytes(file) as stream, accessible(file.path):
                yield from self._read(stream, file, reader)

    def _read(self, stream: BinaryIO, file: SourceFile, reader: Reader) -> Iterator[Document]:
        """Yield the documents of a file, or of a file in an archive, from its decompressed content."""
        kind = format_of(file.name)
        if kind in ("tar", "zip"):
            read = read_tar if kind == "tar" else read_zip
            yield from read(
                stream, file, reader.left_out, lambda inner, member: self._member(inner, member, reader)
            )
        elif kind == "parquet":
            yield from read_parquet(_seekable(stream), file.name, file.path, reader)
        elif kind == "arrow":
            yield from read_arrow(_seekable(stream), file.name, file.path, reader)
        else:
            yield from self._read_text(stream, file, kind, reader)

    def _member(self, stream: BinaryIO, file: SourceFile, reader: Reader) -> Iterator[Document]:
        name = PurePosixPath(file.name)
        if format_of(file.name) in ("tar", "zip"):
            reader.left_out.add_file(file.name, "archive in an archive", file.size)
        elif name.name.startswith("."):
            reader.left_out.add_file(file.name, "hidden", file.size)
        elif isinstance(self.row_text, ImageRows):
            yield from self.row_text.read(stream, file, reader.left_out)
        elif format_of(file.name) in ("parquet", "arrow"):
            yield from self._read(io.BytesIO(decompressed(stream, file).read()), file, reader)
        else:
            yield from self._read(decompressed(stream, file), file, reader)

    def _read_text(
        self, stream: BinaryIO, file: SourceFile, kind: Format, reader: Reader
    ) -> Iterator[Document]:
        suffix = suffix_of(file.name)
        if suffix in UNREAD:
            raise UserError(
                f"{file.path}: {suffix} is a format that is not read; {UNREAD[suffix]}, or leave the file out"
            )
        buffered = _buffered(stream)
        if kind == "text":
            head = buffered.peek(SNIFF_BYTES)[:SNIFF_BYTES]
            if self.encoding == "auto" and not is_text(head, suffix):
                if self.is_single_file:
                    raise UserError(
                        f"{file.path} is not text (it contains NUL bytes or other binary data). {TEXT_HINT}"
                    )
                reader.left_out.add_file(file.name, f"not text{f', {suffix}' if suffix else ''}", file.size)
                return
            yield from read_text(buffered, file.name, file.path, reader)
        elif kind == "jsonl":
            yield from read_jsonl(buffered, file.name, file.path, reader)
        elif kind == "json":
            yield from read_json(buffered, file.name, file.path, reader)
        else:
            yield from read_csv(buffered, file.name, file.path, reader, "\t" if kind == "tsv" else None)


def find_corpus(
    path: str | tuple[str, ...] | None,
    *,
    text_field: str = "text",
    template: str | None = None,
    encoding: str = "auto",
    conversation: Conversation = PARAGRAPHS,
    answer: str | None = None,
    label_field: str = "label",
    kind: str = "text",
    images: ImagesConfig | None = None,
) -> Corpus:
    """List the files of `path` (see `DataConfig.path`) without reading them.

    Args:
        answer: template of the answer of examples, if there is one.
        label_field: field that holds the label of a labelled text.
        kind: what rows are, as in `DataConfig.kind`.
        images: size of the images of kind `images`.

    Raises:
        UserError: there is no such file, or it contains no text.
    """
    row_text = RowText(text_field, template, conversation)
    if kind == "chat":
        row_text = RowExamples(text_field, template, answer, conversation)
    elif kind == "preferences":
        row_text = RowPairs(text_field, None, None, conversation)
    elif kind == "classify":
        row_text = RowLabels(text_field, template, label_field, conversation)
    elif kind == "images":
        row_text = ImageRows(images or ImagesConfig())
        path = str(digits_file()) if path is None else path
    if path is None:
        return Corpus("the Python standard library", tuple(list_stdlib()), row_text, is_stdlib=True)
    left_out = LeftOut()
    paths = (path,) if isinstance(path, str) else path
    files: list[SourceFile] = []
    single = False
    for each in paths:
        found, single = list_path(each, left_out)
        files += _without_metadata(found, left_out)
    files = list({file.path: file for file in files}.values())
    single = single and len(files) == 1 and format_of(files[0].name) not in ("tar", "zip")
    origin = path if isinstance(path, str) else ", ".join(path)
    if not any(f.size for f in files):
        what = "the file is empty" if single else "it contains no text"
        also = f" (left out: {left_out.details()})" if left_out else ""
        raise UserError(f"data.path={origin}: {what}{also}. {TEXT_HINT}")
    unlisted = tuple(left_out.as_json())
    return Corpus(origin, tuple(files), row_text, encoding, is_single_file=single, unlisted=unlisted)


def _without_metadata(files: list[SourceFile], left_out: LeftOut) -> list[SourceFile]:
    """Leave out what the package datasets writes beside its data: metadata, and every split but `train`."""
    names = {file.name for file in files}
    folders = {os.path.dirname(name) for name in names if name.rpartition("/")[2] == "state.json"}
    sets = {folder for folder in folders if os.path.join(folder, "dataset_info.json") in names}
    dicts = {os.path.dirname(name) for name in names if name.rpartition("/")[2] == "dataset_dict.json"}
    kept = []
    for file in files:
        folder, _, name = file.name.rpartition("/")
        parent, _, split = folder.rpartition("/")
        in_dict = folder in sets and parent in dicts and os.path.join(parent, "train") in sets
        is_metadata = folder in sets and name in ("state.json", "dataset_info.json")
        if is_metadata or (folder in dicts and name == "dataset_dict.json"):
            left_out.add_file(file.name, "metadata of a data set", file.size)
        elif in_dict and split != "train":
            left_out.add_file(file.name, f"split {split}; name it in data.path to train on it", file.size)
        else:
            kept.append(file)
    return kept


def _read_part(file: SourceFile, part: Part, reader: Reader) -> Iterator[Document]:
    """Yield the documents of a part of a file of Parquet or JSON lines."""
    with file.open() as stream, accessible(file.path):
        if format_of(file.name) == "parquet":
            yield from read_parquet(stream, file.name, file.path, reader, range(part.begin, part.end))
        else:
            window = _buffered(Window(stream, part.begin, part.end))
            yield from read_jsonl(window, file.name, file.path, reader, part.rows_before, part.begin)


def _buffered(stream: BinaryIO | io.RawIOBase) -> io.BufferedReader:
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, stream), CHUNK)


def _seekable(stream: BinaryIO) -> BinaryIO:
    """Return the stream, or its content in memory if it can't be read at any place, since it is decompressed."""
    return stream if stream.seekable() else io.BytesIO(stream.read())
