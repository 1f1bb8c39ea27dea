"""The run's record survives kills, resumes and full disks."""

import json
import subprocess
from pathlib import Path

import pytest

from megatrain.observe.rundir import RunLog


def steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_keeps_each_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 8):
        log.row({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed in the middle of a line
    log = RunLog(tmp_path)
    log.open(5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    log.row({"step": 6})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_values_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    RunLog(tmp_path).row({"step": 1, "a": float("nan"), "b": float("inf"), "c": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "a": None, "b": None, "c": 1.5}


def test_events_have_a_time_and_status_counts_attempts(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        log = RunLog(tmp_path)
        log.event("start", step=0)
        log.status("running", step=0, reason="")
        log.status("stopped", step=4, reason="SIGTERM", exit_code=75)
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["attempt"], status["state"], status["exit_code"]) == (attempt, "stopped", 75)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["attempt"] for event in events] == [1, 2, 3]
    assert all(event["time"] and event["event"] == "start" for event in events)


def test_a_full_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        log = RunLog(disk)
        for step in range(2000):
            log.row({"step": step, "text": "x" * 50})
        log.status("done", step=1, reason="done")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert capsys.readouterr().err.count("can't be written") == 1
