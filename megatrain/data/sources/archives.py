"""Documents of the files in tar and zip archives, WebDataset's shards among them."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from megatrain.config.errors import UserError
from megatrain.data.sources.formats import suffix_of
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import SourceFile
from megatrain.data.sources.readers import Document
from megatrain.data.sources.streams import CHUNK, Bounded, expansion_limit

ReadMember = Callable[[BinaryIO, SourceFile], Iterator[Document]]
"""Reads one member, as a file of its own."""


def read_tar(stream: BinaryIO, file: SourceFile, left_out: LeftOut, read: ReadMember) -> Iterator[Document]:
    """Yield the documents of a tar archive in the order of its members.

    Members of one name up to the first dot are a sample of WebDataset: where one is text, the `.json` beside it holds
    its metadata, and is left out.

    Raises:
        UserError: the archive is damaged.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            held: list[tuple[SourceFile, bytes]] = []
            text_key = ""
            for member in archive:
                inner = _member(file, member.name, member.size)
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    if not member.isdir():
                        left_out.add_file(inner.name, "link in an archive", 0)
                    continue
                key = _key(member.name)
                if held and _key(held[0][0].path) != _key(inner.path):
                    yield from _flush(held, read)
                if suffix_of(member.name) in (".txt", ".md"):
                    text_key = key
                    _drop(held, left_out)
                if suffix_of(member.name) != ".json":
                    yield from read(cast(BinaryIO, io.BufferedReader(cast(Any, content), CHUNK)), inner)
                elif key == text_key:
                    left_out.add_file(inner.name, "metadata of a sample", inner.size)
                else:
                    held.append((inner, content.read()))
            yield from _flush(held, read)
            while rest := archive.fileobj.read(CHUNK):
                if rest.strip(b"\0"):
                    raise UserError(
                        f"{file.path} goes on after its archive ends, as joined archives do; keep them apart"
                    )
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{file.path} is not a readable tar archive: {error}") from None


def read_zip(stream: BinaryIO, file: SourceFile, left_out: LeftOut, read: ReadMember) -> Iterator[Document]:
    """Yield the documents of a zip archive in the order of its members.

    Raises:
        UserError: the archive is damaged, encrypted, or expands beyond the limit.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                inner = _member(file, member.filename, member.file_size)
                bounded = Bounded(archive.open(member), file, expansion_limit(file))
                yield from read(cast(BinaryIO, io.BufferedReader(bounded, CHUNK)), inner)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{file.path} is not a readable zip archive: {error}") from None


def _member(file: SourceFile, name: str, size: int) -> SourceFile:
    return SourceFile(f"{file.path}/{name}", f"{file.name}/{name}", size, ())


def _key(name: str) -> str:
    """Return the name of the sample that a member belongs to."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _flush(held: list[tuple[SourceFile, bytes]], read: ReadMember) -> Iterator[Document]:
    while held:
        inner, content = held.pop(0)
        yield from read(cast(BinaryIO, io.BytesIO(content)), inner)


def _drop(held: list[tuple[SourceFile, bytes]], left_out: LeftOut) -> None:
    while held:
        inner, _ = held.pop(0)
        left_out.add_file(inner.name, "metadata of a sample", inner.size)
