"""Whose checkpoint, whose config, whose directory: nothing of another run is taken up, and nothing is written to it."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from workplace import Workplace, command


def steps(workplace: Workplace, name: str) -> list[str]:
    return sorted(path.name for path in (workplace.folder / "runs" / name / "checkpoints").glob("step-*"))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


ENDLESS = ("train.steps=100000", "checkpoint.every=2", "train.eval_every=0", "train.sample_tokens=0")


def test_a_late_process_writes_nothing_into_the_run_of_another(workplace: Workplace) -> None:
    """It is stopped, the directory is removed, another one starts there, and it goes on."""
    directory = workplace.folder / "runs" / "late"
    first = workplace.start(workplace.tiny("run.name=late", "train.seed=11", *ENDLESS))
    try:
        wait_for(lambda: len(steps(workplace, "late")) >= 1)
        os.kill(first.pid, signal.SIGSTOP)
        shutil.rmtree(directory)
        workplace.run(workplace.tiny("run.name=late", "train.seed=7"))
        kept = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        owner = json.loads((directory / "owner.json").read_text())
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 2, said
    assert f"belongs to process {owner['pid']} on {owner['host']}" in said
    assert "Traceback" not in said
    assert kept == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_whose_directory_is_removed_ends_with_a_sentence(workplace: Workplace) -> None:
    directory = workplace.folder / "runs" / "gone"
    process = workplace.start(workplace.tiny("run.name=gone", *ENDLESS))
    try:
        wait_for(lambda: len(steps(workplace, "gone")) >= 1)
        shutil.rmtree(directory, ignore_errors=True)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, said
    assert "was removed" in said
    assert not (directory / "status.json").exists()


def test_another_runs_checkpoint_is_refused_or_adopted(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=a", "train.seed=7", "train.stop_at=4"))
    workplace.run(workplace.tiny("run.name=b", "train.seed=8", "optim.lr=0.02", "train.stop_at=8"))
    runs = workplace.folder / "runs"
    shutil.copytree(runs / "b/checkpoints/step-00000008", runs / "a/checkpoints/step-00000008")
    done = workplace.run(workplace.tiny("run.name=a", "train.seed=7"), expect=2)
    assert "step-00000008 belongs to another run ('b', id " in done.stderr
    refused = workplace.run(command("generate", "runs/a", "x"), expect=2)
    assert "belongs to another run" in refused.stderr
    shutil.rmtree(runs / "a/checkpoints/step-00000008")
    workplace.run(workplace.tiny("run.name=a", "train.seed=7", "train.stop_at=5"))

    adopt = "checkpoint.adopt=runs/b/checkpoints/step-00000004"
    workplace.run(
        workplace.tiny("run.name=c", "train.seed=7", adopt, "train.stop_at=2", "train.eval_every=1")
    )
    (event,) = [
        json.loads(line)
        for line in (runs / "c/events.jsonl").read_text().splitlines()
        if "weights_from" in line
    ]
    assert event["weights_from"]["step"] == 4
    rows = {name: workplace.rows(name) for name in "bc"}
    (before,) = [row for row in rows["c"] if row["step"] == 0]
    assert before["run_id"] == json.loads((runs / "c/status.json").read_text())["run_id"]
    assert {row["run_id"] for row in rows["b"]}.isdisjoint({row["run_id"] for row in rows["c"]})
    # The run goes on from its own checkpoints, whatever becomes of the other one.
    shutil.rmtree(runs / "b")
    workplace.run(
        workplace.tiny("run.name=c", "train.seed=7", adopt, "train.stop_at=4", "train.eval_every=1")
    )
    nowhere = workplace.run(workplace.tiny("run.name=d", adopt), expect=2)
    assert "checkpoint.adopt=runs/b/checkpoints/step-00000004: there is no checkpoint" in nowhere.stderr
    assert not (runs / "d").exists()


def test_a_changed_config_or_tokenizer_is_not_used(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=edited", "train.stop_at=4"))
    run = workplace.folder / "runs" / "edited"
    config, text = run / "config.yaml", (run / "config.yaml").read_text()
    config.write_text(text.replace("norm_eps: 1.0e-06", "norm_eps: 1.0e-03"))
    for line in (command("generate", "runs/edited", "x"), command("export", "runs/edited", "out")):
        done = workplace.run(line, expect=2)
        assert "model.norm_eps: 1e-06 in the checkpoint, 0.001 there" in done.stderr
        assert not (workplace.folder / "out").exists()
    config.write_text(text)
    _change_a_file(run / "tokenizer")
    for line in (command("generate", "runs/edited", "x"), command("export", "runs/edited", "out")):
        assert "its hash is wrong" in workplace.run(line, expect=2).stderr
    workplace.run(workplace.tiny("run.name=edited", "train.stop_at=6"))  # writes the tokenizer anew
    workplace.run(command("generate", "runs/edited", "x"))


def test_a_config_that_another_run_has_replaced_is_seen_at_the_checkpoint(workplace: Workplace) -> None:
    """The config is compared with the checkpoint itself, not only with the file beside it."""
    workplace.run(workplace.tiny("run.name=seeds", "train.stop_at=4"))
    config = workplace.folder / "runs" / "seeds" / "config.yaml"
    config.write_text(config.read_text().replace("  seed: 0", "  seed: 5"))
    done = workplace.run(workplace.tiny("run.name=seeds", "train.seed=5"), expect=2)
    assert "train.seed: was 0, now 5" in done.stderr


def _change_a_file(folder: Path) -> None:
    path = sorted(folder.iterdir())[0]
    path.write_bytes(path.read_bytes() + b" ")
