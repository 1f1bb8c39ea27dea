"""Files that are hashed while they are written, and reach the disk before anybody relies on them."""

import hashlib
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PARALLEL_BYTES = 1 << 18  # a shorter piece is hashed sooner than another thread wakes up
SYNC_BYTES = 32 << 20  # the disk starts on what is written so far while the rest is hashed
READ_BYTES = 4 << 20


class FileRecord(NamedTuple):
    """What the manifest says of a file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


class HashingWriter:
    """A new file. Hash, copy to the page cache and transfer to the disk run at once, on one core each.

    `close` returns after `fsync`; then `record` holds. `abandon` closes without syncing.
    """

    def __init__(self, path: Path) -> None:
        self.record: FileRecord | None = None
        self.failure: OSError | None = None
        self._file = path.open("xb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._helpers = ThreadPoolExecutor(2)
        self._sync: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: Any) -> int:
        """Write all of `data`, a contiguous buffer. `failure` keeps an OSError, for callers that lose it."""
        view = memoryview(data).cast("B")
        try:
            if view.nbytes < PARALLEL_BYTES:
                self._digest.update(view)
                self._file.write(view)
            else:
                hashed = self._helpers.submit(self._digest.update, view)
                try:
                    self._file.write(view)
                finally:
                    hashed.result()
            self._sync_early(view.nbytes)
        except OSError as error:
            self.failure = self.failure or error
            raise
        return view.nbytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Sync and close; nothing happens the second time."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            if self._sync is not None:
                self._sync.result()
            os.fsync(self._file.fileno())
            self.record = FileRecord(self._file.tell(), self._digest.hexdigest())
        except OSError as error:
            self.failure = self.failure or error
            raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._helpers.shutdown()
        try:
            self._file.close()
        except OSError as error:  # what the buffer still held did not fit either
            self.failure = self.failure or error

    def _sync_early(self, written: int) -> None:
        self._unsynced += written
        if self._unsynced < SYNC_BYTES or (self._sync is not None and not self._sync.done()):
            return
        if self._sync is not None:
            self._sync.result()  # the kernel reports a write error once: it must not be lost here
        self._sync = self._helpers.submit(os.fdatasync, self._file.fileno())
        self._unsynced = 0


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write and sync a new file."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: what was created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` and its missing parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of `path`."""
    return shutil.disk_usage(path).free
