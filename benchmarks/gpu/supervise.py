"""Keeps a worker process at its parts: what hangs or dies costs its own step, and every part ends in time.

A step that fails as an exception should is reported by the worker itself. A kernel that hangs, or that leaves the
device unusable to its process, takes the process with it: then another one goes on behind that step.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARES = {"ceilings": 0.1, "correctness": 0.22, "speed": 0.4, "training": 0.28}
"""Of the whole time; what a part leaves over is the next one's. The first pays for a cold start."""
TOTAL_S = 510.0
STEP_S = 90.0
"""A step that takes longer is stopped; compiling takes a minute at worst."""
GRACE_S = 15.0
"""By which a part's last step may overrun."""
POLL_S = 0.1
WRITE_S = 10.0


@dataclass
class Progress:
    """What is known so far."""

    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cuts: dict[str, str] = field(default_factory=dict)
    """Part -> why it is not whole."""
    done: list[str] = field(default_factory=list)
    current: dict[str, Any] | None = None
    """The step under way: part, index, about."""
    since: float = 0.0

    def take(self, line: dict[str, Any]) -> None:
        """Take in one line of the worker's journal."""
        ((kind, value),) = line.items()
        if kind == "machine":
            self.machine = value
        elif kind == "row":
            self.rows.append(value)
        elif kind == "cut":
            self.cuts[value["part"]] = value["why"]
        elif kind == "done":
            self.done.append(value)
            self.current = None
        else:
            self.current, self.since = value, time.time()

    def fail(self, why: str) -> tuple[str, int] | None:
        """Give up the step under way, with an error unless the worker reported one; return where to go on."""
        if self.current is None:
            return None
        part, about = self.current["part"], self.current["about"]
        if why:
            self.rows.append({"part": part, **about, "error": why})
        following = part, self.current["index"] + 1
        self.current = None
        return following


def deadlines(parts: list[str], seconds: float, now: float) -> dict[str, float]:
    """Return when each of `parts` must be over, in seconds since 1970."""
    whole, passed, found = sum(SHARES[part] for part in parts), 0.0, {}
    for part in parts:
        passed += SHARES[part] / whole
        found[part] = now + passed * seconds
    return found


def supervise(
    parts: list[str], *, small: bool, seconds: float, write: Callable[[Progress], None], command: list[str]
) -> Progress:
    """Run `parts` within `seconds`; `write` is called after every part, and now and then in between.

    command: what starts a worker, to which its arguments are added.
    """
    progress, ends = Progress(), deadlines(parts, seconds, time.time())
    start: tuple[str, int] | None = (parts[0], 0)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        journal.touch()
        with journal.open() as lines:
            while start is not None:
                arguments = [
                    "--journal",
                    str(journal),
                    "--deadlines",
                    json.dumps(ends),
                    "--start",
                    *map(str, start),
                ]
                worker = subprocess.Popen(
                    [*command, *arguments, *(["--small"] if small else [])], process_group=0
                )
                try:
                    start = _watch(worker, lines, progress, ends, write)
                finally:
                    _end(worker)
                write(progress)
    return progress


def _watch(
    worker: subprocess.Popen[bytes],
    lines: Any,
    progress: Progress,
    ends: dict[str, float],
    write: Callable[[Progress], None],
) -> tuple[str, int] | None:
    """Wait until the worker is done or has to be stopped; return where another one goes on."""
    written = time.time()
    while True:
        code = worker.poll()  # before the journal is read, so that nothing of a dead worker's is missed
        finished = len(progress.done)
        for line in lines:
            progress.take(json.loads(line))
        if len(progress.done) > finished or time.time() - written > WRITE_S:
            write(progress)
            written = time.time()
        if code == 0:
            return None
        if code is not None:
            known = bool(progress.rows) and _is_of(progress.rows[-1], progress.current)
            start = progress.fail("" if known else f"the process died: {_cause(code)}")
            if start is None:
                progress.cuts["worker"] = f"the process died outside a step: {_cause(code)}"
            return start
        why = _overdue(progress, ends)
        if why:
            return progress.fail(why)
        time.sleep(POLL_S)


def _is_of(row: dict[str, Any], step: dict[str, Any] | None) -> bool:
    """Return whether the row reports an error in the step."""
    return (
        step is not None
        and row["error"] is not None
        and row.items() >= {"part": step["part"], **step["about"]}.items()
    )


def _overdue(progress: Progress, ends: dict[str, float]) -> str:
    """Return why the step under way must be stopped; empty: it need not be."""
    if progress.current is None:
        return ""
    took = time.time() - progress.since
    if took > STEP_S:
        return f"stopped after {took:.0f} s"
    late = time.time() > ends[progress.current["part"]] + GRACE_S
    return f"stopped after {took:.0f} s: the part's time was up" if late else ""


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def worker_command() -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.worker"]
