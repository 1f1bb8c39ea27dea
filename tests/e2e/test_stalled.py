"""A process that hangs ends the run in time, with a sentence; nothing waits without end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workplace import Workplace, wait_for_rows

from megatrain.config.errors import StalledError
from megatrain.data.store import build_once
from megatrain.runtime.launch import GRACE_S
from megatrain.runtime.processes import MEETING

LIMIT_S = 8  # a busy machine takes a second for a step


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_hangs_ends_the_run(workplace: Workplace, which: int) -> None:
    line = workplace.tiny(
        "run.name=hung",
        "parallel.dp_shard=2",
        "train.steps=100000",
        "train.eval_every=0",
        "train.precision=fp32",
        f"resilience.timeout_s={LIMIT_S}",
    )
    process = workplace.start(line)
    assert wait_for_rows(process, workplace.folder / "runs/hung/metrics.jsonl", 3)
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(pids[which]), signal.SIGSTOP)
    before = time.monotonic()
    _, said = process.communicate()
    assert time.monotonic() - before < LIMIT_S + GRACE_S + 20  # a busy machine ends processes slowly
    assert process.returncode == 1
    # Where it was stopped: before a collective, or within one.
    where = "(did not arrive at|has stood still in) .* dp_shard .*"
    sentence = rf"Rank {which} \(host [^)]+\) {where}: it is stopped \(SIGSTOP\), in the phase"
    assert re.search(sentence, said)
    assert len(said.splitlines()) < 5, said
    status = json.loads((workplace.folder / "runs/hung/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert re.match(f"StalledError: {sentence}", status["reason"])
    (report,) = (workplace.folder / "runs/hung/logs").glob("hang-*.txt")
    assert re.search(sentence, report.read_text())


def test_a_process_that_is_alone_and_stands_still_ends(workplace: Workplace) -> None:
    """In its loader, as on a file system that does not answer. One that is stopped goes on when it is woken."""
    line = workplace.tiny(
        "run.name=alone",
        "train.steps=9",
        "train.eval_every=0",
        "checkpoint.every=2",
        "resilience.timeout_s=3",
    )
    said = workplace.run(line, expect=1, environment={"TEST_PLANT": "planted_sleep"}).stderr
    sentence = r"Rank 0 \(host [^)]+\) has stood still since .*: it is in the phase 'batch' of step 4, at .* in sleeper"
    assert re.search(sentence, said), said
    status = json.loads((workplace.folder / "runs/alone/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert re.match(f"StalledError: {sentence}", status["reason"])

    process = workplace.start(line)
    assert wait_for_rows(process, workplace.folder / "runs/alone/metrics.jsonl", 4)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(8)  # more than twice the limit: that nothing happens can't be waited for otherwise
    os.kill(process.pid, signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0


def test_without_the_machine_of_rank_0_another_one_says_so_in_status_json(workplace: Workplace) -> None:
    line = workplace.tiny(
        "run.name=lost",
        "parallel.dp_shard=2",
        "train.steps=100000",
        "train.eval_every=0",
        "resilience.timeout_s=8",
    )
    places = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting = {MEETING: str(workplace.folder / "meeting")}
    first, second = (workplace.start(line, environment={"RANK": rank, **places, **meeting}) for rank in "01")
    assert wait_for_rows(first, workplace.folder / "runs/lost/metrics.jsonl", 3)
    (guard,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    for pid in (int(guard), first.pid):
        os.kill(pid, signal.SIGKILL)
    _, said = second.communicate()
    assert second.returncode == 1
    sentence = r"Rank 0 \(host [^)]+\) has given no sign since .*: ended, or its machine is down"
    assert re.search(sentence, said), said
    status = json.loads((workplace.folder / "runs/lost/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert re.match(f"StalledError: {sentence}", status["reason"])


HOLDER = """
import sys
from pathlib import Path
from megatrain.data.store import build_once

def build(folder):
    print("begun", flush=True)
    sys.stdin.read()

build_once(Path(sys.argv[1]), build, waiting=lambda: None)
"""


def test_one_that_stands_still_in_preparing_data_is_not_waited_for(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "begun\n"
        with pytest.raises(StalledError, match="Another process prepares the same data"):
            build_once(tmp_path / "data", lambda _: None, waiting=lambda: None, patience_s=1.0)
    finally:
        holder.kill()
        holder.communicate()
