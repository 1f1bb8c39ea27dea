"""Bytes and text of a file: compression by its name, encoding by its first bytes or the config."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, cast

from megatrain.config.errors import UserError
from megatrain.data.sources.listing import SourceFile

MAX_EXPANSION = 100
"""A compressed file that grows by more than this factor, and to more than `EXPANSION_FLOOR`, is refused."""
EXPANSION_FLOOR = 1 << 30
"""Bytes."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2", ".lz4")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK = 1 << 20


class Bounded(io.RawIOBase):
    """A decompressed stream that refuses to grow without bound."""

    def __init__(self, inner: Any, file: SourceFile, limit: int) -> None:
        self._inner, self._file, self._limit, self._read = inner, file, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size.

        Raises:
            UserError: the file is damaged, or expands beyond the limit.
        """
        try:
            data = self._inner.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            if "too much memory" in str(error):
                raise UserError(
                    f"{self._file.path} was compressed with a window of more than 128 MB (zstd --long), which is not "
                    "read; compress it without, or decompress it first"
                ) from None
            raise UserError(
                f"{self._file.path} can't be decompressed: {error}. It is damaged, or not what its name says."
            ) from None
        self._read += len(data)
        if self._read > self._limit:
            raise UserError(
                f"{self._file.path} holds {self._file.size:,} bytes and expands to more than {self._limit:,}, "
                f"{MAX_EXPANSION} times as many, as files made to fill a disk do. If it is meant, decompress it first."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


class Window(io.RawIOBase):
    """The bytes `begin` to `end` of a stream."""

    def __init__(self, inner: BinaryIO, begin: int, end: int) -> None:
        self._inner, self._left = inner, end - begin
        inner.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        data = self._inner.read(min(len(buffer), self._left))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file's content, decompressed by the end of its name.

    Raises:
        UserError: it can't be read or decompressed, or expands beyond the limit.
    """
    with file.open() as raw:
        yield decompressed(raw, file)


def decompressed(raw: BinaryIO, file: SourceFile) -> BinaryIO:
    """Return the stream `raw` of `file`, decompressed by the end of its name."""
    name = file.name.lower()
    opener = next((how for end, how in _OPENERS.items() if name.endswith(end)), None)
    if opener is None:
        return raw
    return cast(BinaryIO, io.BufferedReader(Bounded(opener(raw), file, expansion_limit(file)), CHUNK))


def expansion_limit(file: SourceFile) -> int:
    """Return the bytes to which a compressed file may expand."""
    return max(EXPANSION_FLOOR, MAX_EXPANSION * file.size)


def _by_arrow(name: str) -> Callable[[IO[bytes]], Any]:
    def opened(raw: IO[bytes]) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), name)

    return opened


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".xz": lzma.LZMAFile,
    ".bz2": lambda raw: bz2.BZ2File(raw),
    ".zst": _by_arrow("zstd"),
    ".lz4": _by_arrow("lz4"),
}
_OPENERS |= {
    ".tgz": _OPENERS[".gz"],
    ".txz": _OPENERS[".xz"],
    ".tbz2": _OPENERS[".bz2"],
    ".tzst": _OPENERS[".zst"],
}


def uncompressed_name(name: str) -> str:
    """Return `name` without the end that says how the file is compressed."""
    end = next((end for end in COMPRESSIONS if name.lower().endswith(end)), "")
    return name[: len(name) - len(end)]


def encoding_of(head: bytes, chosen: str) -> str:
    """Return the codec for text that begins with `head`: `chosen`, unless a byte-order mark says another."""
    marked = next((codec for mark, codec in MARKS if head.startswith(mark)), None)
    if marked:
        return marked
    return "utf-8" if chosen == "auto" else chosen


def decode(content: bytes, where: str, chosen: str) -> str:
    """Decode a whole file.

    Raises:
        UserError: it is not in that encoding; names the byte.
    """
    encoding = encoding_of(content, chosen)
    try:
        text = content.decode(encoding)
        text.encode()  # some codecs give lone surrogates
    except UnicodeDecodeError as error:
        raise undecodable(where, encoding, content[error.start], error.start) from None
    except UnicodeError as error:
        raise UserError(f"{where} is not {encoding.upper()}: {error}") from None
    return text


def undecodable(where: str, encoding: str, byte: int, offset: int, of: str = "") -> UserError:
    """Return the error about a byte that is not text."""
    name = "UTF-8" if encoding in ("utf-8", "utf-8-sig") else encoding.upper()
    return UserError(
        f"{where} is not {name}: byte 0x{byte:02x} at offset {offset}{of}. "
        "Set data.encoding if all text is in another encoding (latin-1, cp1252, shift_jis, ...), or convert it with "
        "iconv."
    )


def lines(
    stream: BinaryIO, where: str, chosen: str, lines_before: int = 0, offset: int = 0
) -> Iterator[tuple[int, str]]:
    """Yield the lines of a stream with their numbers, from 1; the line breaks are kept.

    `lines_before` and `offset` (bytes) say where in the file `where` the stream begins.

    Raises:
        UserError: a line is not in the encoding; names line and byte.
    """
    buffered = (
        stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, stream), CHUNK)
    )
    encoding = encoding_of(buffered.peek(4), chosen)
    if encoding.startswith(("utf-16", "utf-32")):  # a line break is more than one byte
        text = io.TextIOWrapper(buffered, encoding=encoding, newline="\n")
        try:
            yield from enumerate(text, 1)
        except UnicodeError as error:
            raise UserError(f"{where} is not {encoding.upper()}: {error}") from None
        return
    for number, raw in enumerate(buffered, lines_before + 1):
        codec = "utf-8" if encoding == "utf-8-sig" and number > 1 else encoding
        try:
            text_line = raw.decode(codec)
        except UnicodeDecodeError as error:
            byte = raw[error.start] if error.start < len(raw) else 0
            raise undecodable(
                f"{where}:{number}", encoding, byte, offset + error.start, " of the file"
            ) from None
        yield number, text_line
        offset += len(raw)
