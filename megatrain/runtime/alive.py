"""Signs that a process works on something long, for those that wait for it, or watch it."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WINDOW_S = 5.0
LEAST = 0.01
"""Share of one core that a working process uses at least: waiting threads and libraries use a hundredth of it."""
LEAST_BUSY = 0.1
"""Share of one core that a process uses at least which computes, and does not only wait for something in a loop."""
LEAST_RATE = 1 << 18
"""Bytes a second that a process reads or writes at least which waits for a slow disk or network."""


@contextlib.contextmanager
def signs_of_work(report: Callable[[], None], *, window_s: float = WINDOW_S) -> Iterator[None]:
    """Call `report` every `window_s` in which this process, with those that it started, has computed.

    One that is stopped, or stands still in a deadlock or a file system that does not answer, gives no sign. A thread
    calls `report`.
    """
    ended = threading.Event()

    def watch() -> None:
        before = processor_seconds(os.getpid())
        while not ended.wait(window_s):
            now = processor_seconds(os.getpid())
            if abs(now - before) >= LEAST * window_s:  # less where a child has ended
                report()
            before = now

    thread = threading.Thread(target=watch, name="signs-of-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and, on Linux, of its children; 0 where that can't be known."""
    total = 0.0
    if pid == os.getpid():
        own = os.times()
        total = own.user + own.system
    with contextlib.suppress(AttributeError, OSError):  # not on Linux
        ticks = 0 if total else _ticks(f"/proc/{pid}/stat")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):  # it has just ended
                    ticks += _ticks(f"/proc/{child}/stat")
        total += ticks / os.sysconf("SC_CLK_TCK")
    return total


def bytes_moved(pid: int) -> int:
    """Return how many bytes a process has read and written; 0 where that can't be known."""
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(rows["rchar"]) + int(rows["wchar"])
    return 0


@dataclass
class Effort:
    """What the process `pid` has spent, each time that somebody asked."""

    pid: int
    seconds: float = 0.0
    moved: int = 0
    asked: float = 0.0

    def goes_on(self, *, within_s: float) -> bool:
        """Return whether it has worked since the last question; no, if that is more than `within_s` ago."""
        seconds, moved, now = processor_seconds(self.pid), bytes_moved(self.pid), time.monotonic()
        passed = now - self.asked
        computes = seconds - self.seconds >= LEAST_BUSY * passed
        transfers = moved - self.moved >= LEAST_RATE * passed
        self.seconds, self.moved, self.asked = seconds, moved, now
        return passed < within_s and (computes or transfers)


def _ticks(path: str) -> int:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
