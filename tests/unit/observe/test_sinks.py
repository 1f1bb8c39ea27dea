"""Rows reach every sink, and no sink can end a run."""

import json
import logging
from pathlib import Path

import pytest

from megatrain.observe.config import LogConfig
from megatrain.observe.display import NoDisplay
from megatrain.observe.rundir import RunLog
from megatrain.observe.sinks import Observer


def observe(directory: Path, cfg: LogConfig, rows: list[dict[str, object]], run_id: str = "") -> None:
    observer = Observer(directory, cfg, NoDisplay(), RunLog(directory, run_id), {"seed": 0})
    for row in rows:
        observer.step(row)
    observer.close()


def test_every_nth_row_and_each_validation(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": step} for step in range(1, 8)]
    rows[4]["eval/loss"] = 1.0
    observe(tmp_path, LogConfig(every=3, wandb="off"), rows)
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [3, 5, 6]


def test_times_and_rates_are_those_of_all_steps_since_the_last_row(tmp_path: Path) -> None:
    """One step of 1 s at 300 tokens/s and one of 3 s at 100: 600 tokens in 4 s."""
    slow: dict[str, object] = {
        "step": 2,
        "train/loss": 4.0,
        "perf/step_time_s": 3.0,
        "perf/tokens_per_sec": 100.0,
    }
    fast: dict[str, object] = {"train/loss": 5.0, "perf/step_time_s": 1.0, "perf/tokens_per_sec": 300.0}
    observe(
        tmp_path,
        LogConfig(every=2, wandb="off"),
        [{"step": 1} | fast, slow, {"step": 3} | fast, slow | {"step": 4}],
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    mean = {"train/loss": 4.0, "perf/step_time_s": 2.0, "perf/tokens_per_sec": 150.0, "attempt": 1}
    assert rows == [{"step": 2} | mean, {"step": 4} | mean]


def test_tensorboard_has_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: list[dict[str, object]] = [
        {"step": n, "train/loss": 4.0 - n, "data/sample_digest": "a"} for n in (1, 2, 3)
    ]
    observe(tmp_path, LogConfig(wandb="off", tensorboard=True), rows)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_failing_sink_is_left_out_with_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def no_network(**_: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", no_network)  # an unreachable server would take its full time-out
    observe(tmp_path, LogConfig(wandb="online"), [{"step": 1}, {"step": 2}])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events] == ["Weights & Biases is disabled from here on: no network"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_has_the_same_wandb_id(tmp_path: Path) -> None:
    for step in (1, 2):
        observe(tmp_path, LogConfig(wandb="offline"), [{"step": step, "train/loss": 1.0}], "4f2a")
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs
    assert all(name.endswith("-4f2a") for name in runs)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["run_id"] for row in rows} == {"4f2a"}
