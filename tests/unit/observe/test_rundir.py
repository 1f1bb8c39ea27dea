"""The run's record survives kills, resumes and full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from megatrain.observe.rundir import RunLog


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    """What a strict reader sees: NaN and Infinity, which Python's reader would take, are errors."""
    text = (directory / name).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def steps(directory: Path) -> list[object]:
    return [row["step"] for row in rows(directory)]


def test_a_resume_keeps_each_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 8):
        log.row({"step": step})
    log = RunLog(tmp_path)
    log.open(5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    log.row({"step": 6})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo', [1, 2]),
        ('{"step": 1}\n{"ste{"step": 2}\n{"step": 3}\n', [1, 3]),  # torn in the middle: what follows is kept
        ('{"step": 1}\n\0\0\0\0\0\0', [1]),  # what a machine that lost its power may leave
        ('{"step": 1}\n{"step": 2}', [1, 2]),  # whole, but for its end
        ('\udcff\xe9"\n{"step": 2}\n', [2]),  # not even text
        ('3\n"step"\nnull\n{"step": 2}\n', [2]),  # JSON, but no rows
        ("", []),
    ],
)
def test_torn_lines_are_dropped_and_no_others(tmp_path: Path, text: str, kept: list[int]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    log = RunLog(tmp_path)
    log.open(100)
    log.row({"step": 101})
    assert steps(tmp_path) == [*kept, 101]


def test_a_record_in_order_is_not_written_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.row({"step": 1})
    log.event("start", step=0)
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    RunLog(tmp_path).open(1)
    after = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    assert before == after


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    log = RunLog(tmp_path)
    log.row({"step": 1, "a": nan, "b": -inf, "c": 1.5, "d": [nan, 1.0], "e": {"f": inf}})
    log.row({"step": np.int64(2), "a": np.float32(0.5), "b": torch.tensor(nan), "c": None, "d": Path("x")})
    assert rows(tmp_path) == [
        {"step": 1, "a": None, "b": None, "c": 1.5, "d": [None, 1.0], "e": {"f": None}, "attempt": 1},
        {"step": 2, "a": 0.5, "b": None, "c": None, "d": "x", "attempt": 1},
    ]


def test_events_have_a_time_and_status_counts_attempts(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        log = RunLog(tmp_path)
        log.event("start", step=0)
        log.status("running", step=0, reason="")
        log.status("stopped", step=4, reason="SIGTERM", exit_code=75)
        status = json.loads((tmp_path / "status.json").read_text())
        assert status.pop("time") > "2026"
        assert status == {
            "state": "stopped", "step": 4, "reason": "SIGTERM", "exit_code": 75, "attempt": attempt,
            "pid": os.getpid(),
        }  # fmt: skip
    events = rows(tmp_path, "events.jsonl")
    assert [(event["event"], event["attempt"]) for event in events] == [
        ("start", 1),
        ("start", 2),
        ("start", 3),
    ]
    assert all(str(event["time"]).endswith("+00:00") for event in events)


WRITER = """
import itertools, sys
from pathlib import Path
from megatrain.observe.rundir import RunLog
log = RunLog(Path(sys.argv[1]))
for step in itertools.count(1):
    log.row({"step": step, "text": "x" * 3000})
    log.status("running", step=step, reason="y" * 3000)
"""


def test_killed_at_any_moment_the_record_is_whole(tmp_path: Path) -> None:
    metrics, status_file = tmp_path / "metrics.jsonl", tmp_path / "status.json"
    deadline = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as process:
        try:
            while (
                not (metrics.exists() and metrics.stat().st_size > 1_000_000) and time.monotonic() < deadline
            ):
                if (
                    status_file.exists()
                ):  # whoever looks while it is replaced finds the old one or the new one
                    json.loads(status_file.read_text())
        finally:
            process.send_signal(signal.SIGKILL)
    status = json.loads(status_file.read_text())
    last = len(metrics.read_text().splitlines())
    assert abs(status["step"] - last) <= 1
    RunLog(tmp_path).open(last // 2)
    assert steps(tmp_path) == list(range(1, last // 2 + 1))


NO_ROOM = """
import resource, sys
from pathlib import Path
from megatrain.observe.rundir import RunLog
log = RunLog(Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
row = lambda step: log.row({"step": step, "text": "x" * 50})
for step in range(1, 11):
    row(step)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write that would pass it is cut or fails
for step in range(11, 31):
    row(step)
log.status("running", step=30, reason="x" * 2000)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
for step in range(31, 36):
    row(step)
"""


def test_no_room_is_said_once_ends_nothing_and_tears_no_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert len(done.stderr.splitlines()) == 1
    assert "training continues" in done.stderr
    ends = accumulate(
        len(json.dumps({"step": step, "text": "x" * 50, "attempt": 1})) + 1 for step in range(1, 31)
    )
    fitted = sum(end <= 1000 for end in ends)
    assert steps(tmp_path) == [*range(1, fitted + 1), *range(31, 36)]
    assert not list(tmp_path.glob(".*.tmp"))
