"""Encrypted files that are written in one go and read in parts, and whose every change is detected.

Format: a header (magic, id of the key, bytes of a chunk, salt), then the chunks, each with a tag of 16 bytes.
The construction is STREAM (Hoang, Reyhanitabar, Rogaway and Vizár, 2015, "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance"), as Tink's AES-GCM-HKDF streaming has it: each file has a key of its own, derived with
HKDF-SHA256 from the given key, a random salt, the header, and a label that says which file it is. The nonce of a chunk
is its number and whether it is the last. So a chunk that is changed, moved, repeated or left out does not decrypt, nor
does a file in another's place; no nonce is ever used twice with one key.
"""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.keys import Key
from megatrain.runtime.packages import require_package

NAME = "aes-256-gcm"
SUFFIX = ".enc"
"""End of the name of an encrypted file that is no part of a checkpoint."""
CHUNK_BYTES = 256 << 10
"""Bytes of plain text that are encrypted together: the least that is read."""
MAX_CHUNK_BYTES = 64 << 20
TAG_BYTES = 16
HEADER = struct.Struct("<8s8sI32s")
MAGIC = b"MTCRYPT1"


class Sink(Protocol):
    """What an encrypted file is written to."""

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        ...

    def close(self) -> None:
        """End the file."""
        ...


def require_cipher() -> None:
    """Refuse encryption if its package is missing.

    Raises:
        UserError: it is; says how to get it.
    """
    require_package("cryptography", "Encryption")


@dataclass(frozen=True, slots=True)
class FileCipher:
    """Encrypts and decrypts the files of one place with `key`."""

    key: Key
    scope: str
    """What the files belong to, such as the name of a checkpoint: in another's they do not decrypt."""

    def writer(self, sink: Sink, name: str, *, chunk_bytes: int = CHUNK_BYTES) -> "EncryptingWriter":
        """Return a writer of the file `name`, whose encrypted bytes go to `sink`."""
        header = HEADER.pack(MAGIC, bytes.fromhex(self.key.id), chunk_bytes, os.urandom(32))
        return EncryptingWriter(sink, self._file_key(header, name), header, chunk_bytes)

    def reader(self, source: BinaryIO, name: str, size: int) -> io.BufferedReader:
        """Return a seekable reader of the plain text of the file `name`, of which `source` has `size` bytes.

        Reading raises CorruptCheckpointError where the bytes are not those that were written.

        Raises:
            CorruptCheckpointError: it is no encrypted file, one with another key, or its end is missing.
        """
        header = source.read(HEADER.size)
        chunk_bytes = _chunk_bytes(header, size, name, self.key.id)
        raw = DecryptingReader(source, self._file_key(header, name), name, size, chunk_bytes)
        return io.BufferedReader(raw, min(chunk_bytes, CHUNK_BYTES))

    def encrypt(self, data: bytes, name: str) -> bytes:
        """Return the bytes of the file `name` with `data` as its plain text."""
        sink = io.BytesIO()
        writer = self.writer(sink, name)
        writer.write(data)
        writer.finish()
        return sink.getvalue()

    def decrypt(self, raw: bytes, name: str) -> bytes:
        """Return the plain text of the file `name` with the bytes `raw`.

        Raises:
            CorruptCheckpointError: they are not those that were written.
        """
        return self.reader(io.BytesIO(raw), name, len(raw)).read()

    def _file_key(self, header: bytes, name: str) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = b"\0".join((b"megatrain file", header, self.scope.encode(), name.encode()))
        salt = HEADER.unpack(header)[3]
        return bytes(HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(self.key.secret))


class EncryptingWriter:
    """Plain text goes in, header and chunks go to the sink. `finish` writes the last chunk."""

    def __init__(self, sink: Sink, file_key: bytes, header: bytes, chunk_bytes: int) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._sink = sink
        self._aead = AESGCM(file_key)
        self._chunk_bytes = chunk_bytes
        self._waiting = bytearray()  # at most one chunk, since it may be the last
        self._number = 0
        self._done = 0
        self._is_finished = False
        sink.write(header)

    def write(self, data: Any) -> int:
        """Take all of `data`, a contiguous buffer, and return its size in bytes."""
        view, start = memoryview(data).cast("B"), 0
        while start < view.nbytes:
            if len(self._waiting) == self._chunk_bytes:
                self._put(last=False)
            stop = min(view.nbytes, start + self._chunk_bytes - len(self._waiting))
            self._waiting += view[start:stop]
            start = stop
        self._done += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Return the number of bytes of plain text so far."""
        return self._done

    def seek(self, place: int) -> None:
        """Do nothing: an encrypted file is written from its beginning to its end, and `place` is where it is."""
        assert place == self._done, "an encrypted file is written in order"

    def flush(self) -> None:
        """Do nothing; `finish` writes what waits."""

    def finish(self) -> None:
        """Write the last chunk, once; nothing may be written after it."""
        if not self._is_finished:
            self._is_finished = True
            self._put(last=True)

    def close(self) -> None:
        """Write the last chunk and close the sink."""
        self.finish()
        self._sink.close()

    def _put(self, *, last: bool) -> None:
        self._sink.write(self._aead.encrypt(nonce(self._number, last=last), bytes(self._waiting), None))
        self._waiting.clear()
        self._number += 1


class DecryptingReader(io.RawIOBase):
    """The plain text of an encrypted file, at any place; one chunk is in memory."""

    def __init__(self, source: BinaryIO, file_key: bytes, name: str, size: int, chunk_bytes: int) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._source = source
        self._aead = AESGCM(file_key)
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._body = size - HEADER.size
        self._chunks = -(-self._body // (chunk_bytes + TAG_BYTES))
        self._size = self._body - self._chunks * TAG_BYTES
        self._position = 0
        self._number = self._chunks - 1  # the last chunk is read first: only it tells that none is missing
        self._chunk = self._decrypted(self._number)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in the plain text."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a place of the plain text, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read to the end of a chunk at most; return the bytes read, 0 at the end of the file.

        Raises:
            CorruptCheckpointError: the chunk is not the one that was written there.
        """
        view = memoryview(buffer).cast("B")
        if self._position >= self._size:
            return 0
        number, start = divmod(self._position, self._chunk_bytes)
        if number != self._number:
            self._chunk = self._decrypted(number)
            self._number = number
        found = self._chunk[start : start + view.nbytes]
        view[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _decrypted(self, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        width = self._chunk_bytes + TAG_BYTES
        self._source.seek(HEADER.size + number * width)
        sealed = self._source.read(min(width, self._body - number * width))
        try:
            return bytes(self._aead.decrypt(nonce(number, last=number == self._chunks - 1), sealed, None))
        except InvalidTag:
            raise CorruptCheckpointError(
                f"{self._name} was changed: chunk {number} of {self._chunks} is not what was encrypted there"
            ) from None


def nonce(number: int, *, last: bool) -> bytes:
    """Return the nonce of a chunk, 12 bytes: its number, and whether it is the last."""
    return number.to_bytes(11, "big") + bytes([last])


def key_of(path: Path) -> str:
    """Return the id of the key with which the file at `path` was encrypted.

    Raises:
        CorruptCheckpointError: it is no encrypted file.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise CorruptCheckpointError(f"{path.name} is no encrypted file")
    return bytes(HEADER.unpack(header)[1]).hex()


def _chunk_bytes(header: bytes, size: int, name: str, key_id: str) -> int:
    """Return the bytes of a chunk that a header says, after checking it."""
    if len(header) < HEADER.size or not header.startswith(MAGIC) or size < HEADER.size + TAG_BYTES:
        raise CorruptCheckpointError(f"{name} is no encrypted file, or was cut off")
    _, found, chunk_bytes, _ = HEADER.unpack(header)
    if found.hex() != key_id:
        raise CorruptCheckpointError(f"{name} was changed: it is encrypted with the key {found.hex()}")
    rest = (size - HEADER.size) % (chunk_bytes + TAG_BYTES)  # only an empty file has an empty chunk
    is_short = 0 < rest < TAG_BYTES or (rest == TAG_BYTES and size > HEADER.size + TAG_BYTES)
    if not 0 < chunk_bytes <= MAX_CHUNK_BYTES or is_short:
        raise CorruptCheckpointError(f"{name} was changed: its header or its size is wrong")
    return int(chunk_bytes)
