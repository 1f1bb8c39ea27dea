"""A real sweep: every job trains in a process of its own, and one that fails does not stop the others."""

import re
import subprocess
import sys
from pathlib import Path


def test_jobs_train_and_a_failed_one_is_told(tmp_path: Path) -> None:
    tiny = "experiment=smoke train.steps=2 schedule.warmup_steps=1 seq_len=16 train.precision=fp32"
    swept = "train.resume=must,never"  # the first finds no checkpoint
    call = [sys.executable, "-m", "megatrain", "train", "-m", *tiny.split(), swept]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    table = re.findall(r"^ *(\d+) +[\d.]+  (\S+)$", done.stdout, re.MULTILINE)
    assert table == [("2", "runs/smoke/0-resume=must"), ("0", "runs/smoke/1-resume=never")], (
        done.stdout + done.stderr
    )
    assert done.returncode == 2
    assert (tmp_path / "runs" / "smoke" / "1-resume=never" / "metrics.jsonl").is_file()
