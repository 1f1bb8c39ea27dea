"""A run whose machine is lost goes on from the durable tier, as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
from workplace import TINY

from megatrain.checkpoint.tier import Tier
from megatrain.cli.main import main

LINE = ("train", *TINY, "run.name=mine", "log.display=off")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.txt").write_text("".join(f"The square of {n} is {n * n}.\n" for n in range(400)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def events(run: Path, name: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def train(*overrides: str) -> int:
    return main([*LINE, "data.path=my.txt", *overrides])


def test_a_new_machine_goes_on_where_the_lost_one_was(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    durable = f"checkpoint.durable=file://{place}/store"
    run, stored = place / "runs/mine", place / "store/mine"
    assert train(durable, "train.stop_at=8") == 0
    assert [each["step"] for each in events(run, "upload")][-1] == 8
    assert json.loads((stored / "status.json").read_text())["step"] == 8
    shutil.rmtree(place / "runs")
    assert train(durable) == 0
    assert [each["step"] for each in events(run, "fetch")] == [8]
    rows = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*range(13)]
    assert train("run.name=whole") == 0
    assert main(["checkpoint", "diff", "runs/whole", "runs/mine"]) == 0  # bitwise equal
    capsys.readouterr()
    assert main(["generate", f"file://{stored}", "The", "--tokens", "3"]) == 0
    assert "step 12" in capsys.readouterr().err
    for action in ("ls", "show", "verify"):
        assert main(["checkpoint", action, f"file://{stored}"]) == 0
    assert "step-00000012" in capsys.readouterr().out
    assert main(["checkpoint", "prune", f"file://{stored}", "--keep", "1"]) == 0
    assert Tier(str(stored)).steps() == [12]


def test_whose_the_tier_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    durable = f"checkpoint.durable={place}/store"
    assert train(durable, "train.stop_at=4") == 0
    shutil.rmtree(place / "runs")
    assert train(durable, "train.resume=never") == 2
    assert "has checkpoints" in capsys.readouterr().err
    assert train("train.stop_at=4") == 0  # another run of that name, which knows nothing of the tier
    assert train(durable) == 2
    assert "holds another run" in capsys.readouterr().err
    assert Tier(f"{place}/store/mine").steps() == [4]


def test_damage_there_is_told_and_the_older_one_is_taken(place: Path) -> None:
    durable = f"checkpoint.durable={place}/store"
    assert train(durable, "train.stop_at=8") == 0
    damaged = next((place / "store/mine/checkpoints/step-00000008").glob("*/*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(place / "runs")
    assert train(durable, "train.stop_at=8") == 0
    run = place / "runs/mine"
    assert [each["step"] for each in events(run, "fetch")] == [4]
    assert damaged.name in str([each["text"] for each in events(run, "notice")])
    for each in (place / "store/mine/checkpoints").glob("*/*/*.distcp"):
        each.write_bytes(b"")
    shutil.rmtree(place / "runs")
    assert train(durable) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.dir=s3://bucket/runs", "checkpoint.durable=URL"),
        ("checkpoint.durable=ftp://me:secret@host/x", "must not hold credentials"),
        ("checkpoint.durable=nosuch://bucket/x", "nosuch"),
    ],
)
def test_mistakes_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert train(override) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "secret" not in error
    assert not (place / "runs").exists()
