"""What a run leaves behind, what it shows, and what follows from it."""

import fcntl
import json
from pathlib import Path

import torch
from workplace import Workplace, command


def test_a_run_leaves_everything_and_can_be_used(workplace: Workplace) -> None:
    done = workplace.run(workplace.tiny("run.name=full", "log.wandb=offline", "log.tensorboard=true"))
    run = workplace.folder / "runs" / "full"
    found = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "status.json",
        "checkpoints",
        "tokenizer",
    } <= found
    assert {"wandb", "tensorboard"} <= found
    assert "A sample of text from the model" in done.stdout
    assert done.stdout.count("  megatrain ") == 4

    untrained, *rows = workplace.rows("full")
    of_validation = {"eval/loss", "eval/bits_per_byte", "perf/eval_time_s", "perf/elapsed_s"}
    assert (untrained["step"], untrained.keys()) == (0, {"step", "run_id", "attempt"} | of_validation)
    assert [row["step"] for row in rows] == list(range(1, 13))
    wanted = {
        "train/loss", "train/grad_norm", "train/lr", "train/tokens", "perf/tokens_per_sec",
        "perf/tokens_per_sec_per_device", "perf/step_time_s", "perf/data_time_s", "perf/tflops_per_device",
        "perf/mfu", "memory/peak_gib", "data/sample_digest",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 10, 12]
    assert "eval/bits_per_byte" in rows[-1]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"], status["attempt"]) == ("done", 12, 0, 1)

    text = workplace.run(command("generate", str(run), "Line", "--tokens", "5", "--seed", "3")).stdout
    assert text.startswith("Line")
    again = workplace.run(command("generate", str(run), "Line", "--tokens", "5", "--seed", "3")).stdout
    assert text == again

    workplace.run(
        workplace.tiny("run.name=full", "log.wandb=offline")
    )  # the same command again: nothing to do
    assert len(workplace.rows("full")) == 13


def test_a_second_process_is_refused(workplace: Workplace) -> None:
    run = workplace.folder / "runs" / "held"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = workplace.run(workplace.tiny("run.name=held"), expect=2)
    assert "Another process" in done.stderr


def test_a_damaged_checkpoint_is_put_aside_and_without_a_good_one_the_exit_code_is_3(
    workplace: Workplace,
) -> None:
    workplace.run(workplace.tiny("run.name=d", "train.stop_at=8"))
    checkpoints = workplace.folder / "runs" / "d" / "checkpoints"
    damage(checkpoints / "step-00000008")
    done = workplace.run(workplace.tiny("run.name=d", "train.stop_at=8"))
    assert "step-00000008 is damaged" in done.stdout
    assert (checkpoints / "quarantine").is_dir()
    for step in checkpoints.glob("step-*"):
        damage(step)
    for resume in ("auto", "must", "never"):  # the first puts them aside, and the others find none but these
        done = workplace.run(workplace.tiny("run.name=d", f"train.resume={resume}"), expect=3)
        assert "No intact checkpoint is left" in done.stderr
        assert "start a new run: choose another run.name" in done.stderr
        assert not list(checkpoints.glob("step-*"))
        status = json.loads((checkpoints.parent / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 3)


def damage(checkpoint: Path) -> None:
    """Flip one bit in the middle of the largest file."""
    target = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)


def test_generate_from_nowhere(workplace: Workplace) -> None:
    done = workplace.run(command("generate", "nowhere"), expect=2)
    assert "neither a run directory nor" in done.stderr


def test_a_file_where_the_run_directory_should_be(workplace: Workplace) -> None:
    (workplace.folder / "runs").write_text("in the way")
    done = workplace.run(workplace.tiny(), expect=2)
    assert "Traceback" not in done.stderr


def test_bench_reports_without_writing_a_run(workplace: Workplace) -> None:
    overrides = [word for word in workplace.tiny()[4:] if not word.startswith("data.")]
    line = command("bench", "data=synthetic", "--json", "--steps", "2", *overrides)
    result = json.loads(workplace.run(line).stdout)
    assert result["rates"]["perf/tokens_per_sec"] > 0
    assert {"linear products", "norms", "embedding"} <= {name for name, _ in result["profile"]["classes"]}
    assert result["config"]["seq_len"] == result["seq_len"] == 32
    assert result["flops_per_token"]["full"] > result["flops_per_token"]["causal"] > 0
    assert result["peak"]["how"] == "measured"
    assert len(result["code"]["source_sha256"]) == 64
    assert result["versions"]["torch"] == torch.__version__
    assert not (workplace.folder / "runs").exists()
