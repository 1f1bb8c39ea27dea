"""Runs with DeepSpeed and Accelerate from the command line: signals, exit codes, resuming under another engine."""

import json
import signal
import subprocess
from importlib.util import find_spec

import pytest
from workplace import Workplace, wait_for_rows

pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"the package {name} is not installed")
    for name in ("deepspeed", "accelerate")
]
FP32 = ("optim=adamw", "train.precision=fp32", "log.display=off")
BOUND = 1e-4
"""Relative, of losses and gradient norms in float32 after a few steps."""


@pytest.mark.slow
def test_a_signal_saves_and_another_engine_goes_on(workplace: Workplace) -> None:
    """DeepSpeed finds no compiler, is stopped with 75 and ends without an abort; Accelerate finishes the run."""
    line = workplace.tiny(
        "run.name=moved", "train.steps=4000", "checkpoint.every=0", "train.eval_every=0", *FP32
    )
    process = subprocess.Popen(
        [*line, "engine=deepspeed", "parallel.dp_shard=2", "parallel.zero_stage=3"],
        cwd=workplace.folder,
        env=workplace.environment | {"PATH": str(workplace.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = workplace.folder / "runs" / "moved"
    assert wait_for_rows(process, run / "metrics.jsonl", 2), process.communicate()[0]
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (75, "")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")

    step = status["step"]
    done = workplace.run(
        [*line, "engine=accelerate", "parallel.dp_shard=2", f"train.stop_at={step + 2}"],
    )
    assert (done.stdout, done.stderr) == ("", "")
    rows = workplace.rows("moved")
    assert [row["step"] for row in rows] == list(range(1, step + 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("engine=deepspeed",), ("engine=accelerate",), ("deepspeed.offload_optimizer=true", "engine=deepspeed")],
)
def test_one_process_trains(workplace: Workplace, words: tuple[str, ...]) -> None:
    done = workplace.run(workplace.tiny("run.name=one", "train.steps=6", *FP32, *words))
    assert (done.stdout, done.stderr) == ("", "")
    workplace.run(workplace.tiny("run.name=native", "train.steps=6", *FP32))
    for row, wanted in zip(workplace.rows("one"), workplace.rows("native"), strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in wanted:
                assert row[key] == pytest.approx(wanted[key], rel=BOUND)
