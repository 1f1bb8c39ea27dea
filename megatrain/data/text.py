"""Text corpora: which files make up a corpus, and the documents in them.

A corpus is listed (names, sizes and times only) by `find_corpus`; its text is read by `Corpus.documents`,
any number of times and always in the same order. Every user mistake raises a `UserError` that names the
file.
"""

import glob
import hashlib
import io
import json
import os
import stat
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatrain.config.errors import UserError
from megatrain.runtime.packages import how_to_install

SNIFF_BYTES = 8192  # a NUL byte in the first 8 KiB marks a binary file (git has the same rule)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
CLOCK_TICK_NS = 50_000_000  # file systems round times to 10 ms or less; the rest is margin
TEXT_HINT = "Use a UTF-8 text file, .jsonl, .parquet, a directory of such files, or a glob pattern."


class Document(NamedTuple):
    """One text and its origin: `file`, `file:line` or `file:row`, counted from 1."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the corpus. `name` is its path relative to the corpus, `size` is in bytes, times are in nanoseconds."""

    path: str
    name: str
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of a corpus, sorted by name. `origin` is its description in messages."""

    origin: str
    files: tuple[SourceFile, ...]
    text_field: str = "text"
    is_stdlib: bool = False
    is_single_file: bool = False

    def stamp(self) -> str:
        """Return a digest of paths, sizes and times; equal stamps mean equal content, without reading it."""
        listing = [(f.path, f.size, f.mtime_ns, f.ctime_ns) for f in self.files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def is_settled(self) -> bool:
        """Return whether the last change is old enough that another one would change a file's times."""
        return all(max(f.mtime_ns, f.ctime_ns) < time.time_ns() - CLOCK_TICK_NS for f in self.files)

    def content_digest(self) -> str:
        """Return a digest of the bytes of all files, in order, independent of where they lie."""
        total = hashlib.sha256()
        for file in self.files:
            with _accessible(file.path), open(file.path, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
            total.update(os.fsencode(Path(file.name).suffix.lower()) + b"\0")
        return total.hexdigest()

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield all documents in the order of the files, without empty ones.

        `skipped` counts excluded documents by reason. The standard library's source is cleaned and deduplicated; other
        text is unchanged except for a leading byte-order mark, which is dropped.

        Raises:
            UserError: a file cannot be read or does not contain text.
        """
        skipped = Counter() if skipped is None else skipped
        seen: set[bytes] = set()
        for file in self.files:
            for document in self._read(file, skipped):
                if not document.text:
                    skipped["empty"] += 1
                    continue
                if self.is_stdlib:
                    digest = hashlib.sha256(document.text.encode()).digest()
                    if digest in seen:
                        skipped["duplicate"] += 1
                        continue
                    seen.add(digest)
                yield document

    def _read(self, file: SourceFile, skipped: Counter[str]) -> Iterator[Document]:
        suffix = Path(file.name).suffix.lower()
        with _accessible(file.path):
            if suffix == ".parquet":
                yield from _read_parquet(file, self.text_field)
            elif suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(file, self.text_field)
            elif self.is_stdlib:
                yield from _read_python(file, skipped)
            else:
                yield from self._read_text(file, skipped)

    def _read_text(self, file: SourceFile, skipped: Counter[str]) -> Iterator[Document]:
        content = Path(file.path).read_bytes()
        if b"\0" in content[:SNIFF_BYTES]:
            if self.is_single_file:
                raise UserError(f"{file.path} is not text (it contains NUL bytes). {TEXT_HINT}")
            skipped["binary"] += 1
            return
        yield Document(file.name, _decode(content, file.path))


def find_corpus(path: str | None, *, text_field: str = "text") -> Corpus:
    """List the files of `path` (see `DataConfig.path`) without reading them.

    Raises:
        UserError: there is no such file, or it contains no text.
    """
    if path is None:
        root = sysconfig.get_paths()["stdlib"]
        files = tuple(f for f in _walk(root) if _is_stdlib_source(f.name))
        if not files:
            raise UserError(
                f"no source code of the Python standard library was found in {root}; set data.path"
            )
        return Corpus("the Python standard library", files, text_field, is_stdlib=True)
    root = os.path.abspath(path)
    is_single_file = os.path.isfile(root)
    if _exists(root):
        files = tuple(_expand(root, name=Path(root).name if is_single_file else ""))
    elif glob.has_magic(root):
        matches = sorted(glob.glob(root, recursive=True))
        if not matches:
            raise UserError(f"data.path={path}: no file matches this pattern ({root})")
        found = (f for match in matches for f in _expand(match, name=os.path.relpath(match)))
        files = tuple(
            {f.path: f for f in found}.values()
        )  # `**` matches a directory as well as the files in it
    else:
        raise UserError(f"data.path={path}: there is no such file or directory ({root})")
    if not any(f.size for f in files):
        what = "the file is empty" if is_single_file else "it contains no text"
        raise UserError(f"data.path={path}: {what}. {TEXT_HINT}")
    return Corpus(path, files, text_field, is_single_file=is_single_file)


def _exists(path: str) -> bool:
    """Return whether `path` exists; unlike `os.path.exists`, raise if a directory above it may not be entered."""
    with _accessible(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def _expand(path: str, *, name: str) -> Iterator[SourceFile]:
    """Yield the file `path` under the name `name`, or the files of the directory `path`."""
    with _accessible(path):
        if os.path.isdir(path):
            yield from _walk(path, prefix=f"{name}/" if name else "")
            return
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is neither a file nor a directory. {TEXT_HINT}")
    yield _source_file(path, name, status)


def _walk(root: str, *, prefix: str = "") -> Iterator[SourceFile]:
    """Yield all files below `root`, sorted by name, except hidden ones and those in skipped or linked directories."""
    with _accessible(root), os.scandir(root) as entries:
        found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            if entry.name in SKIPPED_FOLDERS:
                continue
            yield from _walk(entry.path, prefix=f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield _source_file(entry.path, prefix + entry.name, entry.stat())


def _source_file(path: str, name: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_stdlib_source(name: str) -> bool:
    """Return whether a file is Python source, and not one of lib2to3's fixtures in the grammar of Python 2."""
    return name.endswith(".py") and not name.startswith("lib2to3/tests/data/")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UserError(
            f"{where} is not UTF-8: byte 0x{byte:02x} at offset {error.start}. Convert it, e.g. with iconv."
        ) from None


def _read_python(file: SourceFile, skipped: Counter[str]) -> Iterator[Document]:
    """Yield one Python file, decoded as Python does (PEP 263); files in broken encodings, test data, are skipped."""
    content = Path(file.path).read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
        text.encode()  # some codecs give lone surrogates
    except (SyntaxError, UnicodeError, LookupError):
        skipped["undecodable"] += 1
        return
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    clean = "\n".join(line.rstrip() for line in lines).strip("\n")
    yield Document(file.name, f"{clean}\n" if clean else "")


def _read_jsonl(file: SourceFile, field: str) -> Iterator[Document]:
    """Yield the text field of each line; blank lines are skipped."""
    offset = 0
    with open(file.path, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{file.path}:{number}"
            if raw.strip():
                yield Document(f"{file.name}:{number}", _json_text(raw, field, where=where, offset=offset))
            offset += len(raw)


def _json_text(raw: bytes, field: str, *, where: str, offset: int) -> str:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {at} of the file"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON: {error}. A .jsonl file contains one JSON object per line."
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object with a field {field!r}")
    if field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where} has no field {field!r} (its fields: {fields}); set data.text_field")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} holds {type(text).__name__}, not text; set data.text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not Unicode text: {error.reason}") from None
    return text


def _read_parquet(file: SourceFile, column: str) -> Iterator[Document]:
    """Yield the text column, a bounded number of rows at a time; nulls count as empty."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{file.path}: reading Parquet needs pyarrow: {how_to_install('pyarrow')}") from None
    try:
        with pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(
                    f"{file.path} has no column {column!r} (its columns: {', '.join(map(repr, names))}); "
                    "set data.text_field"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str | None):
                        kind = type(text).__name__
                        raise UserError(
                            f"{file.path}: column {column!r} holds {kind}, not text; set data.text_field"
                        )
                    yield Document(f"{file.name}:{row}", text or "")
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{file.path} is not a readable Parquet file: {error}") from None


@contextmanager
def _accessible(path: str) -> Iterator[None]:
    """Turn an OSError about `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
