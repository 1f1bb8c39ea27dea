"""The record of one process in memory that its guard reads: what it does, and its last collectives.

The guard is another process, so it can read the record of a process that is stopped, or that holds the interpreter's
lock. A collective's entry is written before the collective begins; entries have a number in their channel (a process
group, or one direction between two ranks), by which those of several ranks are compared. Only the standard library is
used here.
"""

import mmap
import os
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass

CHANNELS = 128
"""Channels with a last entry of their own; those made later share the ring only."""
RING = 512
"""Entries kept, of all channels together."""
TEXT = 176
"""Bytes of an entry's text."""
HEAD = struct.Struct("<ddqqdq")
"""Time of the last sign of progress (s, monotonic), start of the present wait (0: none), entries so far, step, median
own seconds a step, steps timed."""
TIME, COUNT = struct.Struct("<d"), struct.Struct("<q")
PROGRESS_AT, WAIT_AT, ENTRIES_AT = 0, 8, 16
PHASE = 64
"""Bytes of the phase's name."""
ENTRY = struct.Struct(f"<qd{TEXT}s")
"""Number in its channel (from 1; 0: no entry), time (s, monotonic), text."""
TABLE = HEAD.size + PHASE
SIZE = TABLE + (CHANNELS + RING) * ENTRY.size
SEPARATOR = "\x1f"
WINDOW = 8
"""Steps over which the median of own seconds is taken."""
WARM_UP = 3
"""First steps, which are not timed: compiling, connecting."""
TIMED = (b"batch", b"training")
"""Phases whose time, but for waiting in collectives, is a rank's own."""


class Record:
    """The writing side; any thread may call it."""

    def __init__(self) -> None:
        self.file = _memory_file()
        os.ftruncate(self.file, SIZE)
        self._memory = mmap.mmap(self.file, SIZE)
        self._numbers: list[int] = []
        self._entries = 0
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._waits_from = self._waited = 0.0
        self._phase = b""
        self._own: deque[float] = deque(maxlen=WINDOW)
        self._timed = -WARM_UP
        self._since = self._waited_before = 0.0
        self._spent: float | None = None
        self.doing("starting", -1)

    def channel(self) -> int:
        """Return the index of a new channel."""
        with self._lock:
            self._numbers.append(0)
            return len(self._numbers) - 1

    def touch(self) -> None:
        """Note a sign of progress."""
        TIME.pack_into(self._memory, PROGRESS_AT, time.monotonic())

    def doing(self, phase: str, step: int) -> None:
        """Note what the process does from now on, for the step of this number.

        `batch` begins a step: the own seconds of the one before are those of its phases in `TIMED` without waiting for
        other ranks; a step in which something else was done is not timed.
        """
        now, name = time.monotonic(), phase.encode()
        if self._phase in TIMED:
            spent = now - self._since - (self._waited - self._waited_before)
            self._spent = None if self._spent is None else self._spent + spent
        elif self._phase != b"result":
            self._spent = None
        if name == b"batch":
            if self._spent is not None:
                self._timed += 1
                if self._timed > 0:
                    self._own.append(self._spent)
            self._spent = 0.0
        self._phase, self._since, self._waited_before = name, now, self._waited
        own = statistics.median(self._own) if self._own else 0.0
        with self._lock:
            HEAD.pack_into(self._memory, 0, now, 0.0, self._entries, step, own, max(self._timed, 0))
            self._memory[HEAD.size : TABLE] = name[:PHASE].ljust(PHASE, b"\0")

    def entered(self, channel: int, text: bytes) -> None:
        """Add an entry to a channel, and begin to wait. `text` has `TEXT` bytes at most."""
        now = time.monotonic()
        with self._lock:
            self._numbers[channel] += 1
            entry = ENTRY.pack(self._numbers[channel], now, text)
            at = TABLE + (CHANNELS + self._entries % RING) * ENTRY.size
            self._memory[at : at + ENTRY.size] = entry
            if channel < CHANNELS:
                at = TABLE + channel * ENTRY.size
                self._memory[at : at + ENTRY.size] = entry
            self._entries += 1
            COUNT.pack_into(self._memory, ENTRIES_AT, self._entries)
        self.waits()

    def waits(self) -> None:
        """Note that the main thread waits for other ranks from now on; waits of other threads are not noted."""
        if threading.get_ident() == self._main:
            self._waits_from = time.monotonic()
            TIME.pack_into(self._memory, WAIT_AT, self._waits_from)

    def waited(self) -> None:
        """Note that the wait is over. After one that failed this is not called, so that the guard finds it."""
        if threading.get_ident() == self._main:
            now = time.monotonic()
            self._waited += now - self._waits_from
            TIME.pack_into(self._memory, PROGRESS_AT, now)
            TIME.pack_into(self._memory, WAIT_AT, 0.0)


def _memory_file() -> int:
    """Make a file without a name, in memory where the system has such, that a child process can inherit."""
    if sys.platform == "linux":
        return os.memfd_create("megatrain")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclass(frozen=True, slots=True)
class Entry:
    """One collective that a rank has begun."""

    channel: int
    number: int
    """Its number in the channel, from 1."""
    began: float
    """Seconds, monotonic clock of the host."""
    operation: str
    shape: str
    dtype: str
    site: str
    """File and line of the call."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a record says at one moment."""

    progress: float
    """Last sign of progress; seconds of the monotonic clock, like all times here."""
    step: int
    phase: str
    waits_from: float
    """Since when it waits for other ranks; 0: it does not."""
    own_s: float
    """Median seconds of own work a step, without waiting."""
    timed_steps: int
    last: list[Entry]
    """The last entry of each channel."""
    recent: list[Entry]
    """The last entries of all channels, oldest first."""


def read(memory: mmap.mmap, *, entries: int = 0) -> Snapshot:
    """Read a record from the memory that its process writes to, with its channels and `entries` of its ring."""
    progress, waits_from, count, step, own, timed = HEAD.unpack_from(memory, 0)
    phase = memory[HEAD.size : TABLE].rstrip(b"\0").decode(errors="replace")
    last: list[Entry] = []
    recent: list[Entry] = []
    if entries:
        last = [entry for n in range(CHANNELS) if (entry := _entry(memory, n)) is not None]
        wanted = range(max(count - min(entries, RING), 0), count)
        recent = [entry for n in wanted if (entry := _entry(memory, CHANNELS + n % RING)) is not None]
    return Snapshot(progress, step, phase, waits_from, own, timed, last, recent)


def _entry(memory: mmap.mmap, index: int) -> Entry | None:
    number, began, text = ENTRY.unpack_from(memory, TABLE + index * ENTRY.size)
    parts = text.rstrip(b"\0").decode(errors="replace").split(SEPARATOR)
    if not number or len(parts) != 5 or not parts[0].isdigit():  # none, or just being written
        return None
    return Entry(int(parts[0]), number, began, *parts[1:])


def entry_text(channel: int, operation: str, shape: str, dtype: str, site: str) -> bytes:
    """Return the text of an entry, which `entered` takes; a long site keeps its end."""
    before = SEPARATOR.join((str(channel), operation, shape[:48], dtype, ""))
    return (before + site[-(TEXT - len(before.encode())) :]).encode()[:TEXT]
