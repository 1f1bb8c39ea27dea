"""Signs that a process works on something long, for those that wait for it."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

WINDOW_S = 5.0
LEAST = 0.01
"""Share of one core that a working process uses at least: waiting threads and libraries use a hundredth of it."""


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


def _ticks(path: str) -> int:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
