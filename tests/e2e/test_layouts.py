"""Several processes train what one does, and go on from each other's checkpoints, whoever starts and ends them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from workplace import Workplace, wait_for_rows

from megatrain.cli.main import main

BOUND = 1e-9  # float64: sums in another order differ by 1e-16 each; AdamW divides by small numbers
EXACT = ("train.precision=fp64", "train.ema_decay=0.9")
COMPARED = ("train/loss", "train/grad_norm", "eval/loss")


def assert_same_run(workplace: Workplace, name: str, other: str) -> None:
    """The same samples bit for bit, and metrics and every tensor of the last checkpoint to `BOUND`."""
    rows, truth = workplace.rows(name), workplace.rows(other)
    digests = [[row.get("data/sample_digest") for row in each] for each in (rows, truth)]
    assert digests[0] == digests[1]
    for row, wanted in zip(rows, truth, strict=True):
        for key in COMPARED:
            if key in wanted:
                assert row[key] == pytest.approx(wanted[key], rel=BOUND), (row["step"], key)
    tensors, expected = last_tensors(workplace, name), last_tensors(workplace, other)
    assert tensors.keys() == expected.keys()
    assert any("exp_avg_sq" in key for key in tensors)
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=BOUND, atol=BOUND, msg=key)


def last_tensors(workplace: Workplace, name: str) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, put together by plain torch."""
    last = max((workplace.folder / "runs" / name / "checkpoints").glob("step-*"))
    dcp_to_torch_save(last, workplace.folder / "whole.pt")
    found: dict[str, torch.Tensor] = torch.load(workplace.folder / "whole.pt", weights_only=True)
    return found


def events(workplace: Workplace, name: str) -> list[str]:
    lines = (workplace.folder / "runs" / name / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def started(workplace: Workplace, line: list[str], name: str, rows: int) -> Forked:
    """The process of `line`, as soon as the run `name` has that many rows."""
    process = workplace.start(line)
    metrics = workplace.folder / "runs" / name / "metrics.jsonl"
    wait_for_rows(process, metrics, rows)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def torchrun(workplace: Workplace, line: list[str]) -> list[str]:
    """`line` (python -m megatrain ...) in two processes that torchrun starts."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *line[1:]]


def test_layouts_follow_each_other_in_one_run(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=one", *EXACT))
    changing = (
        ("train.stop_at=3", "parallel.dp_shard=2"),
        ("train.stop_at=6", "parallel.tp=2"),
        ("train.stop_at=9", "parallel.pp=2"),
        ("parallel.dp_shard=1",),
    )
    for layout in changing:
        workplace.run(workplace.tiny("run.name=many", *EXACT, *layout))
    assert_same_run(workplace, "many", "one")
    assert events(workplace, "many").count("resume") == 3
    runs = [str(workplace.folder / "runs" / name) for name in ("many", "one")]
    assert main(["diff", *runs, "--rtol", "1e-8"]) == 0
    assert main(["diff", *runs]) == 1  # rounding


def test_experts_move_between_ranks_in_one_run(workplace: Workplace) -> None:
    """Sizes that the axes do not divide, so that ranks hold shards of different sizes."""
    experts = (
        "model=mixtral_debug",
        "model.n_kv_heads=1",
        "model.experts.n_experts=6",
        "model.experts.ffn_size=23",
        "train.ema_decay=0.9",
        *EXACT,
    )
    workplace.run(workplace.tiny("run.name=one", *experts))
    changing = (
        ("train.stop_at=4", "parallel.dp_shard=2", "parallel.tp=2", "parallel.ep=4"),
        ("train.stop_at=8", "parallel.dp_shard=2", "parallel.tp=2"),
        ("parallel.dp_shard=1",),
    )
    for layout in changing:
        workplace.run(workplace.tiny("run.name=many", *experts, *layout))
    assert_same_run(workplace, "many", "one")


def test_a_run_whose_process_was_killed_says_so_and_goes_on(workplace: Workplace) -> None:
    straight = (*EXACT, "parallel.dp_shard=2")
    workplace.run(workplace.tiny("run.name=whole", *straight))
    line = workplace.tiny("run.name=broken", *straight, "train.sample_tokens=0")
    process = started(workplace, line, "broken", 6)
    victim = children(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode:  # else it had finished before
        assert process.returncode == 128 + signal.SIGKILL
        assert "ended by SIGKILL" in said
    workplace.run(line)
    mine, whole = last_tensors(workplace, "broken"), last_tensors(workplace, "whole")
    assert all(torch.equal(mine[key], whole[key]) for key in whole)


@pytest.mark.parametrize("told", ["the command", "one process"])
def test_sigterm_saves_in_all_processes(workplace: Workplace, told: str) -> None:
    line = workplace.tiny(
        "run.name=stopped",
        "parallel.dp_shard=2",
        "train.steps=100000",
        "checkpoint.every=0",
        "train.eval_every=0",
    )
    process = started(workplace, line, "stopped", 3)
    os.kill(process.pid if told == "the command" else children(process.pid)[1], signal.SIGTERM)
    assert process.wait() == 75, process.said()
    status = json.loads((workplace.folder / "runs" / "stopped" / "status.json").read_text())
    reason = "SIGTERM" if told == "the command" else "signal to another process"
    last = workplace.rows("stopped")[-1]["step"]
    assert (status["state"], status["step"], status["reason"]) == ("stopped", last, reason)
    assert (workplace.folder / f"runs/stopped/checkpoints/step-{last:08d}").is_dir()


def test_processes_end_with_the_command_that_started_them(workplace: Workplace) -> None:
    line = workplace.tiny("run.name=orphans", "parallel.dp_shard=2", "train.steps=100000")
    process = started(workplace, line, "orphans", 3)
    ours = children(process.pid)
    assert len(ours) == 2
    process.kill()
    process.communicate()
    lock = workplace.folder / "runs" / "orphans" / ".lock"
    # The first of them holds the lock until it ends: this waits for that.
    subprocess.run(["flock", str(lock), "true"], check=True, timeout=60)


def test_torchrun_starts_it_as_well(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=one", *EXACT))
    line = workplace.tiny("run.name=two", *EXACT, "parallel.dp_shard=-1")
    workplace.run(torchrun(workplace, line))
    assert_same_run(workplace, "two", "one")


def test_bench_measures_a_layout(workplace: Workplace) -> None:
    train = workplace.tiny("parallel.dp_shard=2", "train.precision=fp32")
    line = [*train[:3], "bench", *train[4:], "--json", "--steps", "1"]
    result = json.loads(workplace.run(line).stdout)
    assert result["layout"] == "dp_shard=2"
    rates = result["rates"]
    assert rates["perf/tokens_per_sec"] == pytest.approx(2 * rates["perf/tokens_per_sec_per_device"])


def test_another_number_of_processes_than_the_layout_has_is_refused(workplace: Workplace) -> None:
    done = workplace.run(torchrun(workplace, workplace.tiny("run.name=odd", "parallel.tp=1")), expect=1)
    sentence = "2 processes started, but the layout (every degree 1) needs 1."
    assert sentence in done.stderr
    said, _, _ = done.stderr.partition("=====")  # torchrun's table has it too, of each process
    assert said.count(sentence) <= 1  # the first process says it, unless torchrun ends it before
    assert not (workplace.folder / "runs").exists()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [("data.path=nowhere.txt", "there is no such file"), ("global_batch_size=3", "global_batch_size=3")],
)
def test_a_mistake_is_said_once_and_nothing_is_written(
    workplace: Workplace, mistake: str, message: str
) -> None:
    done = workplace.run(workplace.tiny("run.name=bad", "parallel.dp_shard=2", mistake), expect=2)
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "runs").exists()
