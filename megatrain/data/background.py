"""The verification of a run's token cache beside training: once on each machine, and remembered beside the cache."""

import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatrain.config.errors import UserError
from megatrain.data.cache import put_aside
from megatrain.data.store import INDEX_FILE, DamagedDataError, read_index
from megatrain.data.verify import Damage, verify

T = TypeVar("T")
VERIFIED_FILE = ".verified-"
"""Beginning of the name of the file in a cache that says what a machine has verified; the machine's id follows."""
MACHINE_ID_FILE = Path("/etc/machine-id")
LOWER_BY = 10
"""Niceness of the thread above that of training: about a tenth of a core that is busy, all of an idle one."""
REPORT_S = 1.0
"""How often a process that waits for the verification looks whether it goes on."""


class _ClosedError(Exception):
    """Nobody waits for the result any more."""


class CacheCheck:
    """The verification of the cache `directory` for one process of a run; there is nothing to do if it is None.

    With `verifies`, which one process of each machine has, a thread compares all hashes, unless this machine has done
    so before and the files are the same by size, times and inode. The loader adds what it finds (`note`). A run asks
    for `damage` in every step, and calls `require_whole` before it saves.
    """

    def __init__(self, directory: Path | None, *, verifies: bool) -> None:
        self.damage: DamagedDataError | None = None
        """What was found first."""
        self.since = 0
        """The step before the first one that was trained on these tokens while they were not verified."""
        self._resumed_at = 0
        self._directory = directory
        self._read = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if directory is None or not verifies:
            return
        self._files = identity(directory)
        self._record = directory / f"{VERIFIED_FILE}{machine_id()}"
        if self._files is None or not _is_recorded(self._record, self._files):
            self._thread = threading.Thread(target=self._verify, name="cache-check", daemon=True)
            self._thread.start()

    @property
    def is_complete(self) -> bool:
        """Whether this process has nothing left to verify."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, step: int, *, unverified_since: int | None) -> None:
        """Take note that training begins or goes on at `step`.

        Args:
            unverified_since: `since` of the checkpoint of `step`, if it was saved before its tokens were verified.
        """
        self._resumed_at = step
        self.since = step if unverified_since is None else unverified_since

    def note(self, damage: DamagedDataError) -> None:
        """Take in damage that was found elsewhere. Any thread may."""
        self.damage = self.damage or damage

    def guard(self, work: Callable[[], T]) -> T:
        """Return `work()`, which reads the data.

        Raises:
            DamagedDataError: it came upon damage; the cache is put aside.
        """
        try:
            return work()
        except DamagedDataError as error:
            self.note(error)
            raise self._explained(0) from None

    def require_whole(self, step: int, *, waits: bool, report: Callable[[], None]) -> bool:
        """Return whether the tokens are verified as far as this process has to; always if it `waits` for that.

        Args:
            step: steps done.
            report: called about once a second while this waits and the verification goes on.

        Raises:
            DamagedDataError: they are damaged; the cache is put aside.
        """
        before = -1.0
        while waits and self.damage is None and not self.is_complete:
            assert self._thread is not None
            self._thread.join(REPORT_S)
            if self._read != before:
                before = self._read
                report()
        complete = self.is_complete  # first: damage found from now on is the next save's
        if self.damage is not None:
            raise self._explained(step) from None
        return complete

    def close(self) -> None:
        """End the verification."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _verify(self) -> None:
        assert self._directory is not None
        if (
            sys.platform == "linux"
        ):  # where each thread has its own niceness: on busy cores training goes first
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + LOWER_BY)
        begin = time.monotonic()
        try:
            damages = verify(self._directory, progress=self._advance, documents=False)
        except _ClosedError:
            return
        if damages:
            self.note(DamagedDataError(f"In {self._directory}, {'; '.join(map(_in_words, damages))}"))
        elif self._files is not None and identity(self._directory) == self._files:
            _write_record(self._record, self._files, time.monotonic() - begin)

    def _advance(self, share: float) -> None:
        self._read = share
        if self._closed.is_set():
            raise _ClosedError

    def _explained(self, step: int) -> DamagedDataError:
        """Put the cache aside; return the error that says so, and what to do."""
        assert self._directory is not None
        try:
            put_aside(self._directory)
        except UserError as error:
            aside = f"{error}, and start the same command again: it builds the tokens"
        else:
            aside = "The cache is put aside: start the same command again, which builds the tokens"
        when = f"at step {step}" if step else "before the first step"
        text = (
            f"stopped {when}, since the token cache is damaged. {self.damage}. Nothing was saved after that was found. "
            f"{aside} anew from their source and goes on from the last checkpoint."
        )
        if self.since < self._resumed_at:
            text += (
                f" First remove the checkpoints after step {self.since}: they were saved at a signal, before these "
                "tokens were verified."
            )
        return DamagedDataError(text)


def machine_id() -> str:
    """Return a name for this machine, for use in a file's name."""
    with contextlib.suppress(OSError):
        return _digest(platform.node() + MACHINE_ID_FILE.read_text())
    return _digest(platform.node())


def identity(directory: Path) -> str | None:
    """Return a digest of size, times and inode of all files of a cache; None if it can't be read."""
    index = read_index(directory)
    if index is None:
        return None
    try:
        found = [(name, os.stat(directory / name)) for name in sorted([INDEX_FILE, *index["files"]])]
    except OSError:
        return None
    return _digest(repr([(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in found]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_recorded(record: Path, files: str) -> bool:
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["files"] == files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_record(record: Path, files: str, seconds: float) -> None:
    """Remember that `files` were verified. A cache that can't be written to is verified each time."""
    unfinished = record.with_name(f"{record.name}.{os.getpid()}")
    facts = {"files": files, "host": platform.node(), "seconds": round(seconds, 3)}
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.replace(record)


def _in_words(damage: Damage) -> str:
    place = "" if damage.offset is None else f" at byte {damage.offset:,}"
    return f"{damage.file} {damage.what}{place}"
