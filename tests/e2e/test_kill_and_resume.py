"""kill -9 at any moment, then the same command: bitwise the run that was never killed."""

import json
import os
import signal
from pathlib import Path

import pytest
from forked import Forked
from workplace import Workplace, final_weights, stable, wait_for_rows


def kill_when(process: Forked, metrics: Path, rows: int) -> None:
    """kill -9 as soon as `metrics` has that many rows."""
    if wait_for_rows(process, metrics, rows):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_killed_run_goes_on_bitwise(workplace: Workplace, precision: str) -> None:
    base = (f"train.precision={precision}", "train.ema_decay=0.9")
    workplace.run(workplace.tiny("run.name=whole", *base))
    broken = workplace.tiny("run.name=broken", *base)
    run = workplace.folder / "runs" / "broken"
    for rows in (2, 6, 9):  # before the first checkpoint, between two, in the middle of a later stretch
        kill_when(workplace.start(broken), run / "metrics.jsonl", rows)
    workplace.run(broken)

    whole = final_weights(workplace.folder / "runs" / "whole", workplace.folder / "whole.pt")
    assert final_weights(run, workplace.folder / "broken.pt") == whole
    assert any("exp_avg_sq" in key for key in whole)
    assert stable(workplace.rows("broken")) == stable(workplace.rows("whole"))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("resume") >= 1


def test_sigterm_saves_and_exits_75(workplace: Workplace) -> None:
    line = workplace.tiny(
        "run.name=stopped", "train.steps=100000", "checkpoint.every=0", "train.eval_every=0"
    )
    process = workplace.start(line)
    metrics = workplace.folder / "runs" / "stopped" / "metrics.jsonl"
    wait_for_rows(process, metrics, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    status = json.loads((metrics.parent / "status.json").read_text())
    last = workplace.rows("stopped")[-1]["step"]
    assert (status["state"], status["step"]) == ("stopped", last)
    assert (metrics.parent / "checkpoints" / f"step-{last:08d}").is_dir()


def test_the_same_command_again_trains_no_further(workplace: Workplace) -> None:
    for stop_at in (4, 4, 2):
        workplace.run(workplace.tiny("run.name=same", f"train.stop_at={stop_at}"))
    assert [row["step"] for row in workplace.rows("same")] == [0, 1, 2, 3, 4]


def test_stop_at_then_on_equals_straight_through(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=straight"))
    workplace.run(workplace.tiny("run.name=halted", "train.stop_at=7"))
    assert workplace.rows("halted")[-1]["step"] == 7
    workplace.run(workplace.tiny("run.name=halted", "train.resume=must"))
    left, right = workplace.folder / "runs" / "halted", workplace.folder / "runs" / "straight"
    assert final_weights(left, workplace.folder / "a.pt") == final_weights(right, workplace.folder / "b.pt")


def test_a_change_that_would_change_the_run_is_refused_by_name(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=fixed", "train.stop_at=4"))
    done = workplace.run(workplace.tiny("run.name=fixed", "optim.lr=0.5", "log.every=2"), expect=2)
    assert "optim.lr: was 0.001" in done.stderr or "optim.lr" in done.stderr
    assert "log.every" not in done.stderr
    allowed = workplace.tiny(
        "run.name=fixed", "optim.lr=0.5", "train.allow_changes=[optim.lr]", "train.stop_at=6"
    )
    workplace.run(allowed)


def test_other_data_under_the_same_name_is_refused(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=data", "train.stop_at=4"))
    workplace.text.write_text(workplace.text.read_text().replace("square", "cube"))
    done = workplace.run(workplace.tiny("run.name=data"), expect=2)
    assert "fingerprint" in done.stderr


def test_resume_never_and_must(workplace: Workplace) -> None:
    done = workplace.run(workplace.tiny("run.name=r", "train.resume=must"), expect=2)
    assert "resume" in done.stderr
    assert not (workplace.folder / "runs" / "r").exists()
    workplace.run(workplace.tiny("run.name=r", "train.stop_at=4"))
    done = workplace.run(workplace.tiny("run.name=r", "train.resume=never"), expect=2)
    assert "never" in done.stderr
