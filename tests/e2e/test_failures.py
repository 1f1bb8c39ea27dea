"""What a run does about a step that is not finite, about a spike, and about replicas that differ."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from workplace import Workplace, final_weights, stable

LONG = ("train.steps=32", "train.eval_every=0", "checkpoint.every=8", "train.precision=fp32")


def train(
    workplace: Workplace, *overrides: str, expect: int = 0, **planted: str
) -> subprocess.CompletedProcess[str]:
    """Train with faults planted."""
    return workplace.run(
        workplace.tiny(*LONG, *overrides), expect, environment={"TEST_PLANT": "planted_steps", **planted}
    )


def events(run: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


def rows_without(workplace: Workplace, name: str, *steps: int) -> list[dict[str, object]]:
    return [row for row in stable(workplace.rows(name)) if row["step"] not in steps]


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(workplace: Workplace) -> None:
    train(workplace, "run.name=one", PLANT_NAN="12")
    two = ("parallel.dp_shard=2", "parallel.zero_stage=1")
    train(workplace, "run.name=two", *two, PLANT_NAN="12", PLANT_RANK="1")
    (skipped,) = events(workplace.folder / "runs" / "one", "step_skipped")
    assert (skipped["step"], skipped["grad_norm"]) == (13, None)
    assert len(skipped["samples"]) == 4
    assert len(skipped["documents"]) == 4
    (same,) = events(workplace.folder / "runs" / "two", "step_skipped")
    assert same["samples"] == skipped["samples"]
    one, both = rows_without(workplace, "one"), rows_without(workplace, "two")
    assert [row["step"] for row in one] == [*range(1, 33)]
    for ours, theirs in zip(one, both, strict=True):
        assert ours["data/sample_digest"] == theirs["data/sample_digest"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_too_many_in_a_row_end_the_run(workplace: Workplace) -> None:
    done = train(workplace, "run.name=bad", "resilience.max_skips=2", expect=1, PLANT_NAN="12,13,14")
    assert "the run diverged at step 15" in done.stderr
    assert "as in the 2 steps before, which were skipped" in done.stderr
    assert max((workplace.folder / "runs" / "bad" / "checkpoints").iterdir()).name == "step-00000008"


def test_a_spike_goes_back_and_passes_over_its_batches(workplace: Workplace) -> None:
    """Equal to a run that has skipped the batches since the checkpoint: bitwise, and again after a kill in between."""
    spike = ("resilience.spike=rollback", "resilience.spike_deviations=30")
    done = train(workplace, "run.name=spiked", *spike, PLANT_SPIKE="26")
    run = workplace.folder / "runs" / "spiked"
    (found,) = events(run, "rollback")
    assert (found["from_step"], found["step"], found["batches_passed_over"]) == (27, 24, 3)
    assert "Training goes on from step 24" in done.stdout + done.stderr
    rows = workplace.rows("spiked")
    assert [row["step"] for row in rows] == [*range(1, 33)]
    # Another attempt at the same: stopped after the roll-back and resumed.
    train(workplace, "run.name=again", *spike, "train.stop_at=28", PLANT_SPIKE="26")
    train(workplace, "run.name=again", *spike, PLANT_SPIKE="26")
    again = workplace.folder / "runs" / "again"
    assert final_weights(again, workplace.folder / "a.pt") == final_weights(run, workplace.folder / "b.pt")
    # The batches after the roll-back are those that followed the spike's.
    train(workplace, "run.name=straight")
    digests = {row["step"]: row["data/sample_digest"] for row in workplace.rows("straight")}
    after = [row["data/sample_digest"] for row in rows if int(str(row["step"])) > 24]
    assert after[:5] == [digests[step] for step in range(28, 33)]


def test_a_second_spike_after_the_same_checkpoint_ends_the_run(workplace: Workplace) -> None:
    spike = ("resilience.spike=rollback", "resilience.spike_deviations=30")
    done = train(workplace, "run.name=twice", *spike, expect=1, PLANT_SPIKE="26,28")
    assert "so these are not the cause" in done.stderr
    status = json.loads((workplace.folder / "runs" / "twice" / "status.json").read_text())
    assert status["state"] == "failed"


def test_replicas_that_differ_end_the_run(workplace: Workplace) -> None:
    layout = ("parallel.dp_replicate=2", "parallel.zero_stage=0", "resilience.compare_replicas_every=5")
    train(workplace, "run.name=equal", *layout, "train.stop_at=6")
    done = train(workplace, "run.name=odd", *layout, expect=1, PLANT_FLIP="1")
    assert "model.embed.weight is not the same on all ranks that hold it" in done.stderr
    (found,) = events(workplace.folder / "runs" / "odd", "replicas_differ")
    assert (found["step"], found["ranks"]) == (5, [0, 1])
