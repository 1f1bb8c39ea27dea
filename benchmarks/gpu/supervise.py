"""Keeps worker processes at their parts: what hangs or dies costs its own step, and everything ends in time.

Compiling and correctness come first, by a pool of processes on one GPU; then what is timed, by one process that has the
GPU for itself. A worker claims a step before it begins it, so any number of workers share a part, and one that is
started anew goes on with the next step. A step that fails as an exception should is reported by the worker itself. A
kernel that hangs, or that leaves the device unusable to its process, takes the process with it.
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
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One part of the benchmark, which the module of its name lists the steps of."""

    share: float
    """Of the whole time; what a part leaves over is the next one's."""
    pooled: bool = False
    """Whether several processes work at it at once."""


PARTS = {
    "compiling": Part(0.22, pooled=True),
    "correctness": Part(0.24, pooled=True),
    "ceilings": Part(0.03),
    "first": Part(0.25),
    "speed": Part(0.16),
    "training": Part(0.10),
}
"""In their order. "first" has the most important figures of speed and training."""
TOTAL_S = 410.0
"""Of all parts; with importing torch beforehand, seven minutes."""
STEP_S = 90.0
"""A step that takes longer is stopped; compiling takes a minute at worst."""
GRACE_S = 2.0
"""By which the last step of a stage may overrun: the next stage needs the GPU for itself."""
GRACE_INSIDE_S = 15.0
"""By which a step may overrun its part inside a stage, since stopping it costs a new process."""
BARREN = 2
"""A process that dies this often outside of any step is given up."""
POLL_S = 0.05
WRITE_S = 1.0
"""Least time between two writings of the results."""

Plan = dict[str, list[str]]
"""Part -> the names of its steps, in order."""
Step = dict[str, Any]
"""part, index and about of a step, as the journal has it."""


@dataclass
class Progress:
    """What is known so far."""

    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cuts: dict[str, str] = field(default_factory=dict)
    """Part -> why it is not whole."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Part -> the names of the steps that were not begun."""
    begun: dict[str, set[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Part -> seconds from its first step's beginning to its last one's end, so far."""
    firsts: dict[str, float] = field(default_factory=dict)

    def begin(self, part: str, index: int) -> None:
        """Note that a step was begun."""
        self.begun.setdefault(part, set()).add(index)
        self.firsts.setdefault(part, time.time())

    def ended(self, part: str) -> None:
        """Note that a step of the part has ended, now."""
        self.seconds[part] = round(time.time() - self.firsts[part], 1)

    def close(self, part: str, names: list[str], given_s: float) -> None:
        """Note which steps of a part that is over were not begun."""
        begun = self.begun.get(part, set())
        missing = [name for number, name in enumerate(names) if number not in begun]
        if missing:
            self.left_out[part] = missing
            why = f"its {given_s:.0f} s were up, {len(missing)} of {len(names)} steps left out"
            self.cuts.setdefault(part, why)


def deadlines(parts: list[str], seconds: float, now: float) -> dict[str, float]:
    """Return when each of `parts` must be over, in seconds since 1970."""
    whole, passed, found = sum(PARTS[part].share for part in parts), 0.0, {}
    for part in parts:
        passed += PARTS[part].share / whole
        found[part] = now + passed * seconds
    return found


def stages(parts: list[str]) -> list[list[str]]:
    """Return the parts in groups of neighbours that all take a pool, or one process."""
    found: list[list[str]] = []
    for part in parts:
        if found and PARTS[found[-1][0]].pooled == PARTS[part].pooled:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def default_lanes() -> int:
    """Return how many processes share the parts that take a pool: two cores are left for the host's other work."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))


@dataclass
class Lane:
    """One place for a worker process, which is started anew where it dies."""

    command: list[str]
    journal: Path
    ends: dict[str, float]
    """When each of its parts must be over."""
    variables: dict[str, str]
    worker: subprocess.Popen[bytes] | None = None
    current: Step | None = None
    since: float = 0.0
    failed: bool = False
    """Whether the worker reported an error of the step under way."""
    barren: int = 0
    read: int = 0

    def start(self) -> None:
        """Start a worker, which goes on with the next step that nobody has claimed."""
        self.journal.touch()
        command = [*self.command, "--journal", str(self.journal), "--deadlines", json.dumps(self.ends)]
        self.worker = subprocess.Popen(command, process_group=0, env={**os.environ, **self.variables})

    def attend(self, progress: Progress) -> bool:
        """Take in what the worker has done and stop it where it must be; return whether the lane is over."""
        assert self.worker is not None
        code = self.worker.poll()  # before the journal is read, so that nothing of a dead worker's is missed
        self._read(progress)
        if code == 0:
            self.end()  # what it started must not use the GPU while others are timed
            return True
        if code is None:
            why = self._overdue()
            if not why:
                return False
            self.end()
            self._read(progress)
        else:
            why = f"the process died: {_cause(code)}"
        if self.current is not None:
            self._fail(progress, why)
        elif code is not None:
            self.barren += 1
            if self.barren >= BARREN:
                progress.cuts["worker"] = f"outside a step {why}"
                return True
        if time.time() >= max(self.ends.values()):
            return True
        self.start()
        return False

    def end(self) -> None:
        """End the worker and the processes that it started."""
        if self.worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGKILL)
            self.worker.wait()

    def _read(self, progress: Progress) -> None:
        with self.journal.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text.rfind(b"\n") + 1  # a line that is being written is read the next time
        self.read += whole
        for line in text[:whole].splitlines():
            self._take(progress, json.loads(line))

    def _take(self, progress: Progress, line: dict[str, Any]) -> None:
        ((kind, value),) = line.items()
        if kind == "machine":
            progress.machine = progress.machine or value
        elif kind == "row":
            progress.rows.append(value)
            self.failed = self.failed or value["error"] is not None
        elif kind == "cut":
            progress.cuts[value["part"]] = value["why"]
        elif kind == "begin":
            self.current, self.since, self.failed = value, time.time(), False
            progress.begin(value["part"], value["index"])
        else:
            progress.ended(value["part"])
            self.current = None

    def _fail(self, progress: Progress, why: str) -> None:
        """Give up the step under way, with an error unless the worker reported one."""
        assert self.current is not None
        part = self.current["part"]
        if not self.failed:
            progress.rows.append({"part": part, **self.current["about"], "error": why})
        progress.ended(part)
        self.current = None

    def _overdue(self) -> str:
        """Return why the worker must be stopped; empty: it need not be."""
        now, last = time.time(), max(self.ends.values())
        if self.current is None:
            return "its time was up" if now > last + GRACE_S else ""
        took = now - self.since
        if took > STEP_S:
            return f"stopped after {took:.0f} s"
        late = now > min(self.ends[self.current["part"]] + GRACE_INSIDE_S, last + GRACE_S)
        return f"stopped after {took:.0f} s: the part's time was up" if late else ""


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


POOL_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there is one process a core already
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what the same bits twice take of cuBLAS
}


def supervise(
    plan: Plan,
    *,
    small: bool,
    seconds: float,
    write: Callable[[Progress], None],
    command: list[str],
    lanes: int = 1,
) -> Progress:
    """Run the parts of `plan` within `seconds`; `write` is called after every step, at most once a second.

    Args:
        command: what starts a worker, to which its arguments are added.
        lanes: how many processes share a part that takes a pool.
    """
    progress, began = Progress(), time.time()
    ends = deadlines(list(plan), seconds, began)
    with tempfile.TemporaryDirectory() as folder:
        for number, parts in enumerate(stages(list(plan))):
            pooled = PARTS[parts[0]].pooled
            arguments = ["--claims", folder, *(["--small"] if small else [])]
            crew = [
                Lane(
                    command=[*command, *arguments],
                    journal=Path(folder) / f"journal-{number}-{lane}",
                    ends={part: ends[part] for part in parts},
                    variables=POOL_VARIABLES if pooled else {},
                )
                for lane in range(lanes if pooled else 1)
            ]
            _run(crew, progress, write)
            for part in parts:
                before = max((end for end in ends.values() if end < ends[part]), default=began)
                progress.close(part, plan[part], ends[part] - before)
            write(progress)
    return progress


def _run(crew: list[Lane], progress: Progress, write: Callable[[Progress], None]) -> None:
    """Run the lanes of one stage until all are over."""
    written, known = 0.0, -1
    try:
        for lane in crew:
            lane.start()
        while crew:
            crew = [lane for lane in crew if not lane.attend(progress)]
            done = len(progress.rows)
            if done != known and time.time() - written > WRITE_S:
                write(progress)
                written, known = time.time(), done
            time.sleep(POLL_S)
    finally:
        for lane in crew:
            lane.end()


def worker_command() -> list[str]:
    """Return what starts a worker."""
    return [sys.executable, "-m", "benchmarks.gpu.worker"]
