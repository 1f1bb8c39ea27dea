"""Launcher of the processes of a run on this machine.

One command line then trains in any layout that fits the machine. (torchrun, which does it for several machines, reports
exit code 1 whatever happened, passes no SIGUSR1 on and kills what has not saved after 30 seconds.)
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatrain.runtime.processes import MEETING, VERDICT
from megatrain.runtime.stop_signals import STOP_SIGNALS, held_back

SAVED_BY_SIGNAL = 75  # EX_TEMPFAIL: stopped by a signal with everything saved; a scheduler may requeue
GRACE_S = 15.0
"""How long the others may take to end after one has failed, or stopped at a signal; they notice when they next wait for
it, but not while they connect."""


def start_here(command: Sequence[str], size: int, *, explain: Callable[[int], str]) -> int:
    """Run `command` as `size` processes; the exit code of the first that failed, or 75 if all saved at a signal.

    Signals that ask to stop are passed on to all.

    Args:
        explain: where to read about the failure of the process of a rank.
    """
    with tempfile.TemporaryDirectory(prefix="megatrain-") as folder:
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), MEETING: f"{folder}/meeting"}
        children: list[subprocess.Popen[bytes]] = []
        with passing_signals(children):  # before the first one starts: a signal may come at any time
            with held_back():
                for rank in range(size):
                    here = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    children.append(subprocess.Popen(command, env=os.environ | shared | here))
            return look_after(children, explain, Path(f"{folder}/meeting{VERDICT}"))


def look_after(children: list[subprocess.Popen[bytes]], explain: Callable[[int], str], verdict: Path) -> int:
    """Wait for all; when one fails, end the others.

    Args:
        verdict: a file that exists if their guards found what is wrong, said it, and ended those that could not.
    """
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    for rank, child in enumerate(children):
        threading.Thread(
            target=lambda rank=rank, child=child: ended.put((rank, child.wait())), daemon=True
        ).start()
    codes: dict[int, int] = {}
    failed: int | None = None
    ended_by_guard = False
    while len(codes) < len(children):
        is_ending = failed is not None or SAVED_BY_SIGNAL in codes.values()
        try:
            rank, code = ended.get(timeout=GRACE_S if is_ending else None)
        except queue.Empty:
            for child in children:
                child.kill()
            continue
        codes[rank] = code
        if code == SAVED_BY_SIGNAL:  # before the first step, the others may be waiting for it
            for other, child in enumerate(children):
                if other not in codes:
                    child.send_signal(signal.SIGTERM)
        was_late = is_ending and code == -signal.SIGKILL
        if failed is None and code not in (0, SAVED_BY_SIGNAL) and not was_late:
            failed, ended_by_guard = rank, verdict.exists()
    if failed is None:
        return max(codes.values())
    if ended_by_guard:
        return 1
    code = codes[failed]
    if code not in (2, 3):  # those messages were printed already
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        print(
            f"megatrain: process {failed} of {len(children)} ended {how}; {explain(failed)}", file=sys.stderr
        )
    return code if code > 0 else 128 - code


@contextlib.contextmanager
def passing_signals(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals that ask to stop on to `children`, so that they can save what they have."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    def wait_for_children(number: int, frame: FrameType | None) -> None:
        """Do nothing: Ctrl-C reaches the children by itself, in the terminal's foreground group."""

    passed = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    ignored = [number for number in passed if signal.getsignal(number) == signal.SIG_IGN]  # nohup
    before: dict[signal.Signals, Any] = {}
    for number in passed:
        if number not in ignored:
            before[number] = signal.signal(number, pass_on)
    before[signal.SIGINT] = signal.signal(signal.SIGINT, wait_for_children)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
