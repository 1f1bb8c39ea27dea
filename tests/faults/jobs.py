"""Small runs of the real command, in processes that are forked from one that has imported torch, with faults planted.

Importing torch takes most of a small run's seconds; a fork takes none of them. Apart from that the processes are those
of `megatrain train` in a layout: the same command line, environment and supervision.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import CONTEXT, be, enter
from workplace import TINY

from megatrain.runtime.launch import look_after
from megatrain.runtime.processes import MEETING, VERDICT
from megatrain.runtime.stop_signals import STOP_SIGNALS

LIMIT_S = 120.0
MODEL = (
    "train.precision=fp32",
    "train.steps=24",
    "train.eval_every=10",
    "train.sample_tokens=0",
    "checkpoint.every=3",
    "checkpoint.keep=2",
    "log.display=off",
    "global_batch_size=4",
    "micro_batch_size=1",
)
EXPERTS = ("model=mixtral_debug", "model.experts.n_experts=4", "model.experts.ffn_size=24")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one process": (),
    "dp_shard=2": ("parallel.dp_shard=2",),
    "dp_replicate=2": ("parallel.dp_replicate=2", "parallel.zero_stage=0"),
    "tp=2": ("parallel.tp=2",),
    "pp=2": ("parallel.pp=2",),
    "cp=2": ("parallel.cp=2",),
    "dp_shard=2, ep=2": (*EXPERTS, "parallel.dp_shard=2", "parallel.ep=2"),
    "pp=2, dp_shard=2, ep=2": (*EXPERTS, "parallel.pp=2", "parallel.dp_shard=2", "parallel.ep=2"),
}
SIZES = {"one process": 1, "pp=2, dp_shard=2, ep=2": 4}


class Child:
    """A rank, with the methods of `subprocess.Popen` that its supervisor uses."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        assert process.pid is not None
        self.pid = process.pid

    def wait(self) -> int:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)


@dataclass
class Attempt:
    """One start of a run: its ranks, and how it ended."""

    ranks: list[Child]
    output: Path
    codes: list[int] = field(default_factory=list)
    thread: threading.Thread | None = None

    def is_alive(self) -> bool:
        return any(rank.process.is_alive() for rank in self.ranks)

    def ended(self) -> int:
        """Return the exit code of the whole, when all have ended."""
        assert self.thread is not None
        self.thread.join(LIMIT_S)
        if self.thread.is_alive():
            for rank in self.ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGCONT)
                rank.kill()
            self.thread.join()
            raise AssertionError(f"the run did not end within {LIMIT_S:g} s")
        return self.codes[0]


def _rank(argv: Sequence[str], cwd: str, environment: Mapping[str, str], output: str, plant: Any) -> None:
    """Be one rank: the command line `argv`, after `plant` has made its changes.

    Signals wait until the command's handlers stand, as they do in a process that the launcher has started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    enter(cwd, [output, output])
    if plant is not None:
        plant(int(environment.get("RANK", "0")))
    be(argv, os.environ | environment)


@dataclass(frozen=True)
class Job:
    """A run in a layout, in a folder of its own."""

    folder: Path
    text: Path
    name: str
    layout: str
    overrides: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def size(self) -> int:
        return SIZES.get(self.layout, 2)

    def start(self, *overrides: str, plant: Callable[[int], None] | None = None) -> Attempt:
        """Start all ranks, and their supervision."""
        line = ["train", f"data.path={self.text}", *TINY, *MODEL, *LAYOUTS[self.layout]]
        line += [f"run.name={self.name}", *self.overrides, *overrides]
        output = self.folder / f"{self.name}.out"
        meeting = self.folder / f"meeting-{time.monotonic_ns()}"
        ranks = []
        for rank in range(self.size):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), MEETING: str(meeting)}
            sizes = {"WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size)}
            environment = {"MEGATRAIN_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
            environment |= places | sizes if self.size > 1 else {}
            process = CONTEXT.Process(
                target=_rank, args=(line, str(self.folder), environment, str(output), plant)
            )
            process.start()
            ranks.append(Child(process))
        attempt = Attempt(ranks, output)

        def supervise() -> None:
            verdict = Path(f"{meeting}{VERDICT}")
            attempt.codes.append(look_after(ranks, lambda rank: f"see the log of rank {rank}", verdict))

        attempt.thread = threading.Thread(target=supervise)
        attempt.thread.start()
        return attempt

    def reach(self, attempt: Attempt, rows: int) -> bool:
        """Wait until metrics.jsonl has that many rows; False if the attempt has ended before."""
        metrics = self.directory / "metrics.jsonl"
        limit = time.monotonic() + LIMIT_S
        while attempt.is_alive() and time.monotonic() < limit:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
                return True
            time.sleep(0.005)  # rows of a file, which nothing announces
        return False
