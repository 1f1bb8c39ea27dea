"""Durable file I/O: files are hashed while they are written, and synced before they are relied on."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

WORKERS = 2
"""Files that a process writes, reads or hashes in parallel: one core hashes more slowly than a fast disk reads."""
SYNC_BYTES = 16 << 20
"""Bytes after which a background sync starts, so that writing to disk overlaps with hashing."""
READ_BYTES = 1 << 20
"""Size of a read or write buffer in bytes."""


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 in hex of a file, as the manifest lists them."""

    size: int
    sha256: str


class HashingWriter:
    """A new file, hashed as it is written and synced in the background.

    `close` returns after `fsync` and sets `record`. `abandon` closes without syncing. `failure` is the first OSError,
    in case a caller in between loses it (torch does).
    """

    def __init__(self, path: Path) -> None:
        self.record: FileRecord | None = None
        self.failure: OSError | None = None
        self._file = path.open("xb", buffering=READ_BYTES)
        self._digest = hashlib.sha256()
        self._syncer = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: Any) -> int:
        """Write all of `data`, a contiguous buffer, and return its size in bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        with self._recording_failure():
            self._file.write(view)
            self._unsynced += view.nbytes
            if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
                self._end_sync()
                self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())
                self._unsynced = 0
        return view.nbytes

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing; `close` flushes."""

    def close(self) -> None:
        """Sync and close the file; a second call does nothing."""
        if self._file.closed:
            return
        with self._recording_failure():
            self._file.flush()
            self._end_sync()
            os.fsync(self._file.fileno())
            self.record = FileRecord(self._file.tell(), self._digest.hexdigest())
            self._file.close()
        self._syncer.shutdown()

    def abandon(self) -> None:
        """Close the file without syncing it."""
        self._syncer.shutdown()
        with suppress(OSError):  # what the buffer still holds may not fit either
            self._file.close()

    def _end_sync(self) -> None:
        """Wait for the sync in the background and raise its error."""
        if self._sync is not None:
            self._sync.result()  # the kernel reports a failed write only once

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write and sync a new file; return its record."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def write_stream(source: BinaryIO, path: Path, *, seen: Callable[[int], None]) -> FileRecord:
    """Write and sync a new file of what is left of `source`; return its record. `seen` is told the bytes of each piece.

    Raises:
        OSError: the disk is full, for instance.
    """
    writer = HashingWriter(path)
    try:
        for piece in iter(partial(source.read, READ_BYTES), b""):
            writer.write(piece)
            seen(len(piece))
        writer.close()
    finally:
        writer.abandon()
    assert writer.record is not None
    return writer.record


def hash_file(path: Path, *, seen: Callable[[int], None] = lambda size: None) -> str:
    """Return the SHA-256 of a file in hex, reading it in pieces; `seen` is told the bytes of each."""
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
            seen(size)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Sync a directory, so that names created, renamed or removed in it survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` and its missing parents, and sync each one's parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def free_bytes(path: Path) -> int:
    """Return the free space for this user on the disk of `path`, in bytes."""
    return shutil.disk_usage(path).free
