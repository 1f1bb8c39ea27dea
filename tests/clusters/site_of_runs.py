"""Runs of two processes in a folder that every host sees, and what they have left there."""

import json
import os
import signal
from pathlib import Path

from workplace import Workplace, stable

TWO = (
    "parallel.dp_shard=2",
    "train.steps=60",
    "checkpoint.every=10",
    "train.eval_every=20",
    "checkpoint.keep=2",
)
"""Overrides of a run of two processes and some seconds."""


class Site:
    """A folder with runs."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.folder = workplace.folder

    def steps(self, name: str) -> int:
        """Steps that the run has recorded."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def status(self, name: str) -> dict[str, object]:
        return dict(json.loads((self.folder / "runs" / name / "status.json").read_text()))

    def events(self, name: str) -> list[str]:
        lines = (self.folder / "runs" / name / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]

    def last_event(self, name: str, event: str) -> str:
        """The last line of that event in the run's ledger."""
        lines = (self.folder / "runs" / name / "events.jsonl").read_text().splitlines()
        return [line for line in lines if json.loads(line)["event"] == event][-1]

    def curve(self, name: str) -> list[dict[str, object]]:
        """The run's metrics without times."""
        return stable(self.workplace.rows(name))

    def logs(self) -> str:
        return "\n".join(
            f"--- {path}\n{path.read_text()}" for path in sorted(self.folder.rglob("launch/**/*.log"))
        )

    def pause(self, name: str) -> None:
        """Stop the run where it is, so that it does not end before what comes next; SIGCONT wakes it."""
        for pid in processes(name, ranks=True):
            os.kill(pid, signal.SIGSTOP)


def processes(name: str, *, ranks: bool = False) -> list[int]:
    """Processes on all hosts whose command line has the run's name, but for the launcher's; or those that train."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        is_agent = b"torch.distributed.run" in words or not words[0].endswith(b"python")
        if f"run.name={name}".encode() in words and b"launch" not in words and not (ranks and is_agent):
            found.append(int(path.parent.name))
    return sorted(found)
