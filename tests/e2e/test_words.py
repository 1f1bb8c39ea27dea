"""The words with which runs begin and end, and that every command in them can be followed as it stands."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from workplace import Workplace, wait_for_rows

ADVICE = re.compile(r"^  (megatrain .+)$", re.MULTILINE)


@pytest.fixture
def shell(workplace: Workplace) -> dict[str, str]:
    """The environment of a shell in which `megatrain` is on the path."""
    return workplace.environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def sh(
    line: str, workplace: Workplace, shell: dict[str, str], expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run one line as a shell reads it."""
    done = subprocess.run(
        line, shell=True, cwd=workplace.folder, env=shell, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


def follow(printed: str, workplace: Workplace, shell: dict[str, str]) -> dict[str, str]:
    """Run every command that a text advises, as a shell reads it; return verb -> what it printed."""
    outputs = {}
    for command in ADVICE.findall(printed):
        done = sh(command, workplace, shell)
        outputs[shlex.split(command)[1]] = done.stdout
    return outputs


def test_a_finished_run_says_all_and_every_command_works(workplace: Workplace, shell: dict[str, str]) -> None:
    odd = workplace.folder / "a text; with 'spaces'.txt"
    workplace.text.rename(odd)
    words = [
        word.replace(str(workplace.text), str(odd))
        for word in workplace.tiny("run.name=a/b,c=1", "run.dir=my runs")
    ]
    printed = workplace.run(words).stdout
    text = odd.read_bytes()
    assert re.search(
        rf"^Data: .*: 1 file, 1 document, {len(text) / 1000:.3g} kB of text", printed, re.MULTILINE
    )
    train = int(re.findall(r"([\d,]+) tokens for training", printed)[0].replace(",", ""))
    held_out = int(re.findall(r"([\d,]+) for validation", printed)[0].replace(",", ""))
    assert train + held_out == len(text) + 2  # bytes, and the end of each part
    plan = re.findall(r"12 steps of 4 x 32 tokens, 1,536 tokens, ([\d.]+) epochs", printed)
    assert float(plan[0]) == pytest.approx(12 * 4 / ((train - 1) // 32), rel=0.01)
    assert "Finished: all 12 steps are done." in printed
    run = workplace.folder / "my runs" / "a" / "b,c=1"
    table = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in table if "eval/loss" in row]
    best = min(rows, key=lambda row: float(row["eval/loss"]))
    assert f"{best['eval/loss']:.4f} ({best['eval/bits_per_byte']:.4f} bits per byte)" in printed
    assert (run / "report.html").stat().st_mode & 0o044

    outputs = follow(printed, workplace, shell)
    assert outputs.keys() == {"generate", "report", "export", "train"}
    assert "Finished: all 24 steps are done." in outputs["train"]
    exported = workplace.folder / "b,c=1-exported"
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}
    again = follow(outputs["train"], workplace, shell)  # the second advice is as good as the first
    assert "Finished: all 48 steps are done." in again["train"]


def test_a_run_that_stops_before_its_end_says_why_and_how_to_go_on(
    workplace: Workplace, shell: dict[str, str]
) -> None:
    printed = workplace.run(workplace.tiny("train.stop_at=4", "train.resume=never")).stdout
    assert "Stopped at step 4 of 12, as train.stop_at=4 asks" in printed
    again = workplace.run(workplace.tiny("train.stop_at=4")).stdout
    assert "Nothing is left to do. Stopped at step 4 of 12" in again
    assert "resuming" not in again
    (go_on,) = [line for line in ADVICE.findall(printed) if line.startswith("megatrain train")]
    done = sh(go_on, workplace, shell)
    assert "resuming at step 4 of 12" in done.stdout
    assert "Finished: all 12 steps are done." in done.stdout
    finished = workplace.run(workplace.tiny()).stdout
    assert "resuming" not in finished
    assert "the run has finished all 12 steps before" in finished


def test_a_signal_is_named(workplace: Workplace, shell: dict[str, str]) -> None:
    words = workplace.tiny("train.steps=100000", "train.eval_every=0")
    with subprocess.Popen(
        words, cwd=workplace.folder, env=workplace.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert wait_for_rows(process, workplace.folder / "runs" / "default" / "metrics.jsonl", 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 75
    assert re.search(r"Stopped by SIGTERM at step \d+ of 100,000; everything is saved", printed)
    assert len(ADVICE.findall(printed)) == 1


def test_a_run_that_diverges_ends_without_a_traceback(workplace: Workplace) -> None:
    done = workplace.run(
        workplace.tiny("optim=sgd", "optim.lr=1e30", "schedule=constant", "schedule.warmup_steps=0"), expect=1
    )
    assert "the run diverged at step" in done.stderr
    assert "Traceback" not in done.stderr


def test_random_tokens_are_called_so(workplace: Workplace) -> None:
    words = [
        word for word in workplace.tiny("data=synthetic") if not word.startswith(("data.path", "data.tok"))
    ]
    printed = workplace.run(words).stdout
    assert "random tokens" in printed
    assert "epoch" not in printed


def test_what_is_missing_is_said_before_anything_is_written(
    workplace: Workplace, shell: dict[str, str]
) -> None:
    """As after `make train`, which leaves transformers out; the command named to get it is this Python's own pip."""
    workplace.run(workplace.tiny("run.name=mine"))
    (workplace.folder / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name in ('transformers', 'tensorboard') "
        "else real(name, package)\n"
    )
    line = "megatrain export runs/mine exported --check"
    without = shell | {"PYTHONPATH": str(workplace.folder)}
    done = sh(line, workplace, without, 2)
    assert not (workplace.folder / "exported").exists()
    pip = done.stderr.partition("Install it: ")[2].strip()
    subprocess.run(
        f"{pip} --dry-run --no-index --no-deps --quiet", shell=True, check=True
    )  # it is installed here
    done = sh(line, workplace, shell)
    assert "largest difference of logits" in done.stdout
    done = workplace.run(
        ["env", f"PYTHONPATH={workplace.folder}", *workplace.tiny("log.tensorboard=true", "run.name=n")], 2
    )
    assert "log.tensorboard=true needs the package tensorboard" in done.stderr
