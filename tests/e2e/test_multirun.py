"""A real sweep: every job trains in a process of its own, and one that fails does not stop the others."""

import json
import re
import subprocess
import sys
from pathlib import Path


def test_jobs_train_and_a_failed_one_is_told(tmp_path: Path) -> None:
    tiny = "experiment=smoke train.steps=2 schedule.warmup_steps=1 seq_len=16 train.precision=fp32"
    swept = "train.resume=must,never"  # the first finds no checkpoint
    call = [sys.executable, "-m", "megatrain", "train", "-m", *tiny.split(), swept]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    table = re.findall(r"^ *(\d+) +[\d.]+  +(\S+) +(\S+) +(\S+)  (\S+)$", done.stdout, re.MULTILINE)
    rows = (tmp_path / "runs" / "smoke" / "1-resume=never" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    figures = [f"{last['train/loss']:.4f}", f"{last['eval/loss']:.4f}", f"{last['perf/tokens_per_sec']:,.0f}"]
    assert table == [
        ("2", "-", "-", "-", "runs/smoke/0-resume=must"),
        ("0", *figures, "runs/smoke/1-resume=never"),
    ], done.stdout + done.stderr
    assert done.returncode == 2


def test_measurements_are_compared_and_a_refused_one_is_a_row(tmp_path: Path) -> None:
    small = "data=synthetic model=llama3_debug seq_len=16 global_batch_size=2 model.hidden_size=32"
    call = [sys.executable, "-m", "megatrain", "bench", "-m", *small.split(), "parallel.tp=1,3"]
    done = subprocess.run(
        [*call, "--steps", "2", "--trace", "traces", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    first, second = json.loads(done.stdout)["measurements"]
    assert (first["exit_code"], first["ratio"], len(first["result"]["step_times_s"])) == (0, 1.0, 2)
    assert first["result"]["trace"] == ["traces/0/trace-rank-0.json"]
    assert json.loads((tmp_path / "traces" / "0" / "trace-rank-0.json").read_text())["traceEvents"]
    assert (second["exit_code"], second["result"]) == (2, None)
    assert second["differs"] == {"parallel.tp": "3"}
    assert "must divide a rank's 16 tokens" in second["reason"]
    assert [each.name for each in tmp_path.iterdir()] == ["traces"]
