"""A process of a whole run falls asleep in its loader, in a save or in an evaluation: it is named, and all ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from workplace import Workplace

from megatrain.runtime.processes import MEETING

pytestmark = pytest.mark.slow
LIMIT_S = 15  # a busy machine takes seconds to start
PROGRAM = """
import os, sys, time
from unittest import mock
from megatrain.cli.main import main
from megatrain.runtime.ending import run_to_the_end

target, calls, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
module, _, name = target.rpartition(".")
if module.endswith("Loader"):
    from megatrain.data.loader import Loader as owner
else:
    import importlib
    owner = importlib.import_module(module)
real, count = getattr(owner, name), 0

def sleeper(*args, **options):
    global count
    count += 1
    if count == calls and os.environ["RANK"] == rank:
        time.sleep(600)
    return real(*args, **options)

setattr(owner, name, sleeper)
del sys.argv[1:4]
sys.exit(run_to_the_end(main))
"""


@pytest.mark.parametrize(
    ("target", "calls", "rank", "words"),
    [
        ("megatrain.data.loader.Loader.step_batch", 6, 1, r"in the phase 'batch' of step \d+"),
        ("megatrain.checkpoint.store.write_tensors", 1, 1, r"in the phase 'saving' of step 4"),
        ("megatrain.train.loop.evaluate", 1, 0, r"in the phase 'evaluating' of step \d+"),
    ],
)
def test_a_sleeping_process_is_named(
    workplace: Workplace, target: str, calls: int, rank: int, words: str
) -> None:
    (workplace.folder / "program.py").write_text(PROGRAM)
    overrides = [
        "run.name=asleep",
        "parallel.dp_shard=2",
        f"resilience.timeout_s={LIMIT_S}",
        "train.steps=100000",
    ]
    arguments = workplace.tiny(*overrides)[3:]  # without `python -m megatrain`
    team = []
    for each in (0, 1):
        places = {"RANK": each, "WORLD_SIZE": 2, "LOCAL_RANK": each, "LOCAL_WORLD_SIZE": 2}
        env = workplace.environment | {name: str(value) for name, value in places.items()}
        env[MEETING] = str(workplace.folder / "meeting")
        command = [sys.executable, "program.py", target, str(calls), str(rank), *arguments]
        team.append(
            subprocess.Popen(command, cwd=workplace.folder, env=env, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=200)[1] for process in team]
    codes = [process.returncode for process in team]
    assert codes[1 - rank] == 1, said
    assert codes[rank] in (1, -signal.SIGKILL), said  # a thread that sleeps can't be ended from within
    sentence = rf"Rank {rank} \(host [^)]+\) did not arrive at .*: it is {words}, at [^ ]+ in "
    assert re.search(sentence, said[0]), said
    status = json.loads((workplace.folder / "runs/asleep/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert re.match(f"StalledError: {sentence}", status["reason"])
    (report,) = (workplace.folder / "runs/asleep/logs").glob("hang-*.txt")
    assert "sleeper" in report.read_text()
    assert not _of(workplace.folder)


def _of(folder: Path) -> list[str]:
    """Processes that still run in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder):
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found
