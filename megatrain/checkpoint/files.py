"""Files that are hashed while they are written, and reach the disk before anybody relies on them."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

WORKERS = (
    2  # files that a process writes, reads or hashes at once: one core hashes slower than a good disk is
)
SYNC_BYTES = 16 << 20  # the disk starts on what is written so far while the rest is hashed
READ_BYTES = 1 << 20


class FileRecord(NamedTuple):
    """What the manifest says of a file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


class HashingWriter:
    """A new file that is hashed as it is written, and goes to the disk in the background.

    `close` returns after `fsync`; then `record` holds. `abandon` closes without syncing. `failure` is the first
    OSError, for callers that lose it.
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
        """Write all of `data`, a contiguous buffer; its size in bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        with self._noting_failure():
            self._file.write(view)
            self._unsynced += view.nbytes
            if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
                self._end_sync()
                self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())
                self._unsynced = 0
        return view.nbytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Nothing: `close` flushes."""

    def close(self) -> None:
        """Sync and close; nothing happens the second time."""
        if self._file.closed:
            return
        with self._noting_failure():
            self._file.flush()
            self._end_sync()
            os.fsync(self._file.fileno())
            self.record = FileRecord(self._file.tell(), self._digest.hexdigest())
            self._file.close()
        self._syncer.shutdown()

    def abandon(self) -> None:
        self._syncer.shutdown()
        with suppress(OSError):  # what the buffer still holds may not fit either
            self._file.close()

    def _end_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()  # the kernel reports a failed write once: it must not be lost here

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise


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
