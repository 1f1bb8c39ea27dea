"""The words with which runs begin and end, and that every command in them can be followed as it stands."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import chdir
from typing import Any

import pytest
from workplace import Workplace, wait_for_rows

from megatrain.cli.main import main
from megatrain.runtime import packages
from megatrain.train import loop
from megatrain.train.state import TrainState
from megatrain.train.step import StepStats, train_step

ADVICE = re.compile(r"^  (megatrain .+)$", re.MULTILINE)
Say = Callable[..., str]


@pytest.fixture
def say(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Say]:
    """Run a command line as a shell would read it, in this process; return what it prints."""

    def run(line: str, expect: int = 0) -> str:
        program, *words = shlex.split(line)
        assert program == "megatrain"
        code = main(words)
        printed = "".join(capsys.readouterr())
        assert code == expect, f"{line}\n{printed}"
        return printed

    monkeypatch.setenv("MEGATRAIN_CACHE", str(workplace.folder / "cache"))
    with chdir(workplace.folder):
        yield run


def tiny(workplace: Workplace, *overrides: str) -> str:
    """The command line of a tiny run on the workplace's text, as a user types it."""
    return shlex.join(["megatrain", *workplace.tiny(*overrides)[3:]])


def test_a_finished_run_says_all_and_every_command_works(workplace: Workplace, say: Say) -> None:
    odd = workplace.folder / "a text; with 'spaces'.txt"
    workplace.text.rename(odd)
    printed = say(tiny(workplace, "run.name=a/b,c=1", "run.dir=my runs", f"data.path={odd}"))
    text = odd.read_bytes()
    assert re.search(
        rf"^Data: .*: 1 file, 1 document, {len(text) / 1e3:.3g} kB of text", printed, re.MULTILINE
    )
    train = int(re.findall(r"([\d,]+) tokens for training", printed)[0].replace(",", ""))
    held_out = int(re.findall(r"([\d,]+) for validation", printed)[0].replace(",", ""))
    assert train + held_out == len(text) + 2  # bytes, and the end of each part
    plan = re.findall(r"12 steps of 4 x 32 tokens, 1,536 tokens, ([\d.]+) epochs", printed)
    assert float(plan[0]) == pytest.approx(12 * 4 / ((train - 1) // 32), rel=0.01)
    assert "Finished: all 12 steps are done." in printed
    run = workplace.folder / "my runs" / "a" / "b,c=1"
    table = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in table if "eval/loss" in row and row["step"]]
    best = min(rows, key=lambda row: float(row["eval/loss"]))
    assert f"{best['eval/loss']:.4f} ({best['eval/bits_per_byte']:.4f} bits per byte)" in printed
    assert (run / "report.html").stat().st_mode & 0o044

    sample = printed.partition("A sample of text from the model:\n\n")[2]
    prompt = shlex.split(next(line for line in ADVICE.findall(printed) if "generate" in line))[3]
    assert prompt in sample[:20]  # one's own text: the words that the samples begin with

    outputs = {shlex.split(line)[1]: say(line) for line in ADVICE.findall(printed)}
    assert outputs.keys() == {"generate", "report", "export", "train"}
    assert "Finished: all 24 steps are done." in outputs["train"]
    exported = workplace.folder / "b,c=1-exported"
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}
    *_, again = ADVICE.findall(outputs["train"])  # is as good as the first
    assert "Finished: all 48 steps are done." in say(again)
    assert "b,c=1-exported-2" in outputs["train"]  # the first name is taken by now


def test_a_run_that_stops_before_its_end_says_why_and_how_to_go_on(workplace: Workplace, say: Say) -> None:
    printed = say(tiny(workplace, "train.stop_at=4", "train.resume=never"))
    assert "Stopped at step 4 of 12, as train.stop_at=4 asks" in printed
    again = say(tiny(workplace, "train.stop_at=4"))
    assert "Nothing is left to do. Stopped at step 4 of 12" in again
    *_, go_on = ADVICE.findall(printed)
    printed = say(go_on)
    assert "resuming at step 4 of 12" in printed
    assert "Finished: all 12 steps are done." in printed
    finished = say(tiny(workplace))
    assert "resuming" not in finished
    assert "the run has finished all 12 steps before" in finished
    refused = say(tiny(workplace, "model.n_layers=3"), 2)
    assert "model.n_layers: was 2, now 3" in refused
    assert "allow_changes" not in refused


def test_a_signal_is_named(workplace: Workplace) -> None:
    words = workplace.tiny("train.steps=100000", "train.eval_every=0")
    with subprocess.Popen(
        words, cwd=workplace.folder, env=workplace.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert wait_for_rows(process, workplace.folder / "runs" / "default" / "metrics.jsonl", 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 75
    assert re.search(r"Stopped by SIGTERM at step [\d,]+ of 100,000; everything is saved", printed)
    assert len(ADVICE.findall(printed)) == 1
    page = (workplace.folder / "runs" / "default" / "report.html").read_text()
    assert "stopped, with everything saved, by SIGTERM" in page


def test_a_run_that_diverges_ends_without_a_traceback(workplace: Workplace, say: Say) -> None:
    wild = (
        "optim=adamw",
        "optim.lr=1e6",
        "optim.weight_decay=1e6",
        "schedule=constant",
        "schedule.warmup_steps=0",
    )
    printed = say(tiny(workplace, *wild), 1)
    assert "the run diverged at step" in printed
    assert "Traceback" not in printed
    page = workplace.folder / re.findall(r"Its curves are in (.*)\.$", printed, re.MULTILINE)[0]
    assert "failed: DivergedError: the run diverged at step" in page.read_text()


def test_a_run_that_fails_leaves_its_report(
    workplace: Workplace, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(state: TrainState, *args: Any, **options: Any) -> StepStats:
        if state.step == 3:
            raise RuntimeError("the <device> is gone")
        return train_step(state, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(loop, "train_step", fails)
        with pytest.raises(RuntimeError, match="is gone"):
            say(tiny(workplace))
    page = (workplace.folder / "runs" / "default" / "report.html").read_text()
    assert "failed: RuntimeError: the &lt;device&gt; is gone" in page
    say(tiny(workplace))  # the same command goes on, and its report says so
    page = (workplace.folder / "runs" / "default" / "report.html").read_text()
    assert "<span class='badge good'>finished</span>" in page


def test_a_refused_run_leaves_the_report_as_it_was(workplace: Workplace, say: Say) -> None:
    say(tiny(workplace))
    page = workplace.folder / "runs" / "default" / "report.html"
    before = page.read_bytes(), page.stat().st_mtime_ns
    say(tiny(workplace, "model.n_layers=3"), 2)
    assert (page.read_bytes(), page.stat().st_mtime_ns) == before


def test_random_tokens_are_called_so(workplace: Workplace, say: Say) -> None:
    words = shlex.split(tiny(workplace, "data=synthetic"))
    printed = say(shlex.join(word for word in words if not word.startswith(("data.path", "data.tok"))))
    assert "random tokens" in printed
    assert "epoch" not in printed


def test_what_is_missing_is_said_before_anything_is_written(
    workplace: Workplace, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `make train`, which leaves transformers out; the command that gets it is of this Python's own pip."""
    say(tiny(workplace, "run.name=mine"))
    line = "megatrain export runs/mine exported --check"
    with monkeypatch.context() as without:
        without.setattr(packages, "find_spec", lambda name: None)
        refused = say(line, 2)
        assert not (workplace.folder / "exported").exists()
        needed = say(tiny(workplace, "log.tensorboard=true", "run.name=n"), 2)
    assert "log.tensorboard=true needs the package tensorboard" in needed
    for text in (refused, needed):
        pip = text.partition("Install it: ")[2].strip()
        subprocess.run(f"{pip} --dry-run --no-index --no-deps --quiet", shell=True, check=True)  # it is there
    assert "largest difference of logits" in say(line)
