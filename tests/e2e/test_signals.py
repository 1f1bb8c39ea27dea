"""A signal that asks to stop, at any moment and to any process: nothing is lost, and exit code and record say so."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from workplace import Workplace, stable

LIMIT_S = 120.0


class Started:
    """A run in the background, and when it reaches a moment."""

    def __init__(self, workplace: Workplace, name: str, *overrides: str, anew: bool = False) -> None:
        """Start it; `anew`: not forked, so that it imports everything by itself."""
        self.line = workplace.tiny(f"run.name={name}", *overrides)
        self.workplace = workplace
        self.run = workplace.folder / "runs" / name
        self.output = workplace.folder / f"{name}.out"
        self.process: subprocess.Popen[bytes] | Forked
        if anew:
            with self.output.open("w") as file:
                self.process = subprocess.Popen(
                    self.line, cwd=workplace.folder, env=workplace.environment, stdout=file, stderr=file
                )
        else:
            self.process = workplace.start(self.line)

    def said(self) -> str:
        return "".join(self.process.said()) if isinstance(self.process, Forked) else self.output.read_text()

    def reach(self, moment: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_S
        while not moment():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < limit, "the moment never came"
            time.sleep(0.005)  # a state of files and processes, which nothing announces

    def ended(self) -> int:
        return self.process.wait(LIMIT_S)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found

    def stops(self) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [event for event in events if event["event"] == "stop"]

    def has_status(self, state: str) -> bool:
        return (self.run / "status.json").exists() and self.status()["state"] == state

    def children(self) -> list[int]:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()] if task.exists() else []


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    with open(f"/proc/{pid}/status") as file:
        (caught,) = [line.split()[1] for line in file if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name)
def test_before_the_first_step_there_is_nothing_to_save(workplace: Workplace, number: signal.Signals) -> None:
    started = Started(workplace, "early", anew=True)
    started.reach(lambda: handles(started.process.pid, signal.SIGUSR2))
    started.process.send_signal(number)
    assert started.ended() == 75
    assert f"stopped by {number.name} before the first step" in started.said()
    assert "Traceback" not in started.said()
    assert not (started.run / "checkpoints").exists()
    workplace.run(workplace.tiny("run.name=early", "train.stop_at=2"))


def test_while_a_checkpoint_is_loaded_the_record_says_so(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=loading", "train.stop_at=4"))
    started = Started(workplace, "loading")
    before = started.status()["time"]
    owner = (started.run / "owner.json").read_bytes()
    started.reach(lambda: (started.run / "owner.json").read_bytes() != owner)
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == 75
    status = started.status()
    assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", "SIGTERM", 75)
    assert status["time"] > before
    assert started.stops()[-1]["reason"] == "SIGTERM"


def test_in_the_first_validation_there_is_nothing_to_save(workplace: Workplace) -> None:
    started = Started(workplace, "validating", "train.eval_tokens=1000000000", "data.val_fraction=0.5")
    started.reach(lambda: started.has_status("running"))
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == 75
    assert (started.status()["state"], started.status()["step"]) == ("stopped", 0)
    assert not list((started.run / "checkpoints").glob("step-*"))


def test_a_validation_that_is_no_longer_wanted_is_not_owed(workplace: Workplace) -> None:
    settings = ("train.steps=8", "train.eval_every=4", "checkpoint.every=2", "train.eval_tokens=1000000")
    started = Started(workplace, "changed", *settings)
    metrics = started.run / "metrics.jsonl"
    started.reach(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") == 4)
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == 75
    for stop_at in (6, 8):
        workplace.run(
            [
                *started.line,
                "train.eval_every=0",
                f"train.stop_at={stop_at}",
                "train.allow_changes=[train.eval_every]",
            ]
        )
    assert [row["step"] for row in workplace.rows("changed")] == list(range(9))


@pytest.mark.parametrize("steps", [4, 6])
def test_a_validation_that_a_signal_calls_off_is_made_later(workplace: Workplace, steps: int) -> None:
    settings = (
        f"train.steps={steps}",
        "train.eval_every=4",
        "checkpoint.every=2",
        "train.early_stop_patience=5",
    )
    started = Started(workplace, "called-off", *settings, "train.eval_tokens=1000000")
    metrics = started.run / "metrics.jsonl"
    started.reach(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") == 4)  # of steps 0 to 3
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == 75
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[4]["step"] == started.status()["step"] == 4
    assert "eval/loss" not in rows[4]
    workplace.run(started.line)
    workplace.run([*started.line, "run.name=whole"])
    records = [workplace.folder / "runs" / name / "metrics.jsonl" for name in ("called-off", "whole")]
    found, whole = (stable([json.loads(line) for line in path.read_text().splitlines()]) for path in records)
    assert found == whole
    assert [row["step"] for row in whole if "eval/loss" in row] == sorted({0, 4, steps})
    said = workplace.run(started.line).stdout
    assert "Nothing is left to do" in said


def test_during_a_save_the_next_step_is_saved_too(workplace: Workplace) -> None:
    started = Started(workplace, "saving", "train.steps=100000", "checkpoint.every=1", "checkpoint.keep=2")
    started.reach(
        lambda: any((started.run / "checkpoints").glob(".tmp-step-*[1-9]-*"))
    )  # not the probe for space
    started.process.send_signal(signal.SIGHUP)
    assert started.ended() == 75
    status = started.status()
    assert status["reason"] == "SIGHUP"
    assert (started.run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_in_the_last_sample_the_run_is_done(workplace: Workplace) -> None:
    started = Started(workplace, "sampling", "train.steps=2", "train.sample_tokens=1000000")
    started.reach(lambda: started.has_status("done"))
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == 0
    assert started.status()["state"] == "done"


@pytest.mark.parametrize("moment", ["start", "step"])
def test_one_of_several_processes_stops_all(workplace: Workplace, moment: str) -> None:
    started = Started(workplace, "two", "parallel.dp_shard=2", "train.steps=100000", "train.eval_every=0")
    if moment == "start":
        started.reach(lambda: len(started.children()) == 2)
        second = started.children()[1]  # before its handlers stand
    else:
        started.reach(lambda: (started.run / "metrics.jsonl").exists())
        second = started.children()[1]
    os.kill(second, signal.SIGUSR1)
    assert started.ended() == 75, started.said()
    assert "Traceback" not in started.said()
    assert started.children() == []
    if moment == "step":
        status = started.status()
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        assert (started.run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_time_budget_ends_a_run_in_time(workplace: Workplace) -> None:
    began = time.monotonic()
    line = workplace.tiny(
        "run.name=timed", "train.steps=10000000", "checkpoint.every=0", "train.time_budget=40"
    )
    workplace.run(line, expect=75)
    assert time.monotonic() - began < 60
    status = json.loads((workplace.folder / "runs" / "timed" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "time budget")
    assert (workplace.folder / "runs" / "timed" / "checkpoints" / f"step-{status['step']:08d}").is_dir()
