"""`megatrain diff`: planted differences of runs are named at their step, and layouts are no difference."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from unit.checkpoint.samples import make_tensors
from unit.checkpoint.test_checkpoint_damage import flip_a_bit
from unit.checkpoint.test_checkpoint_inspect import content

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.cli.main import main
from megatrain.config.load import load
from megatrain.parallel.config import ParallelConfig
from megatrain.train.config import Config, RunConfig
from megatrain.train.files import write_config

Call = Callable[..., tuple[int, str, str]]


def save(run: Path, step: int, *, fingerprint: str = "f" * 64, plant: float = 0.0) -> None:
    tensors = make_tensors(step)
    tensors["model.layers.0.w"][2, 3] += plant
    info = {"data_fingerprint": fingerprint}
    state = {"step": step, "watch": {"best": 3.5 + plant}}
    Checkpointer(run / "checkpoints", CheckpointConfig(keep=0)).save(step, tensors, state, info)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 recorded steps with checkpoints of 3 and 6."""
    run = tmp_path_factory.mktemp("made") / "a"
    for step in (3, 6):
        save(run, step)
    write_config(run, load(Config, {"run": {"name": "a"}}))
    rows: list[dict[str, object]] = [{"step": 0, "eval/loss": 6.0}]
    for step in range(1, 7):
        row = {"step": step, "train/loss": 5.0 / step, "train/grad_norm": 1.0 + step, "train/lr": 1e-3}
        rows.append(row | {"data/sample_digest": f"{step:032x}", "train/tokens": 64 * step, "perf/mfu": 0.1})
    rows[4]["train/loss"] = None  # it was not finite
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two copies of that run, `a` and `b`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "a")), Path(shutil.copytree(made, tmp_path / "b"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["diff", "a", "b", *words])
        return code, *capsys.readouterr()

    return run


def change_row(run: Path, step: int, **values: object) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key, value in values.items():
        rows[step][key.replace("__", "/")] = value
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_equal_runs(runs: tuple[Path, Path], call: Call) -> None:
    """Another layout, name and speed are no difference; nothing is written."""
    cfg = load(Config, {"run": {"name": "b"}})
    write_config(runs[1], replace(cfg, run=RunConfig(name="b"), parallel=ParallelConfig(dp_shard=2)))
    change_row(runs[1], 5, perf__mfu=0.9)
    before = content(runs[0].parent)
    code, out, _ = call()
    assert code == 0
    assert "Equal: 7 recorded steps and the checkpoint of step 6." in out
    assert "parallel.dp_shard: 1 and 2" in out
    assert content(runs[0].parent) == before
    found = json.loads(call("--json")[1])
    assert (found["equal"], found["first"], found["checkpoint"]) == (True, None, 6)
    assert found["config_without_effect"] == {"run.name": ["a", "b"], "parallel.dp_shard": [1, 2]}


PLANTED = {
    "initial weights": ((0, {"eval__loss": 6.1}), "step 0, in eval/loss"),
    "samples": ((3, {"data__sample_digest": "0" * 32, "train__loss": 9.0}), "step 3, in data/sample_digest"),
    "loss by one bit": ((5, {"train__loss": 1.0000000000000002}), "step 5, in train/loss"),
    "loss becomes finite": ((4, {"train__loss": 1.25}), "step 4, in train/loss"),
    "norm": ((2, {"train__grad_norm": 3.5}), "step 2, in train/grad_norm"),
    "lr": ((6, {"train__lr": 2e-3, "train__loss": 0.1}), "step 6, in train/lr"),
    "tokens": ((1, {"train__tokens": 63}), "step 1, in train/tokens"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_first_step_and_quantity_are_named(runs: tuple[Path, Path], call: Call, name: str) -> None:
    (step, values), said = PLANTED[name]
    change_row(runs[1], step, **values)
    code, out, _ = call()
    assert code == 1
    assert f"The runs part at {said}.\n" in out
    first = json.loads(call("--json", "--no-tensors")[1])["first"]
    assert (first["step"], first["quantity"]) == (step, said.partition(", in ")[2])
    assert first["b"] == values[first["quantity"].replace("/", "__")]


def test_rtol_ignores_rounding(runs: tuple[Path, Path], call: Call) -> None:
    change_row(runs[1], 2, train__loss=2.5 * (1 + 1e-7), data__sample_digest=f"{2:032x}")
    shutil.rmtree(runs[1] / "checkpoints" / "step-00000006")
    save(runs[1], 6, plant=1e-7)
    assert call()[0] == 1
    assert call("--rtol", "1e-6")[0] == 0
    change_row(runs[1], 2, data__sample_digest="0")
    assert call("--rtol", "1e-6")[0] == 1


def test_tensors_are_compared_where_the_record_is_equal(runs: tuple[Path, Path], call: Call) -> None:
    shutil.rmtree(runs[1] / "checkpoints" / "step-00000006")
    save(runs[1], 6, plant=0.5)
    code, out, _ = call()
    assert code == 1
    assert "The runs part at step 6, in model.layers.0.w[2, 3]." in out
    assert "1 of 11 tensors differ." in out
    assert call("--no-tensors")[0] == 0
    shutil.rmtree(runs[1] / "checkpoints" / "step-00000006")
    code, out, _ = call()  # step 3 is the newest that both have
    assert code == 0
    assert "the checkpoint of step 3." in out


def test_config_and_data(runs: tuple[Path, Path], call: Call) -> None:
    write_config(runs[1], load(Config, {"run": {"name": "a"}, "train": {"seed": 5}}))
    code, out, _ = call()
    assert code == 1
    assert "The runs differ in config, but in no recorded step." in out
    assert "  train.seed: 0 and 5" in out
    save(runs[1], 9, fingerprint="0" * 64)
    found = json.loads(call("--json")[1])
    assert found["data"] == ["f" * 64, "0" * 64]
    assert found["config"] == {"train.seed": [0, 5]}


def test_a_shorter_run_is_compared_as_far_as_it_goes(runs: tuple[Path, Path], call: Call) -> None:
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    (runs[1] / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"step": 4, "tra')  # torn
    shutil.rmtree(runs[1] / "checkpoints")
    code, out, _ = call()
    assert code == 0
    assert "a was recorded up to step 6, b up to 3." in out
    assert "No tensors were compared" in out
    (runs[1] / "metrics.jsonl").unlink()
    assert "No step was recorded by both" in call()[1]


def test_damage_is_damage_and_not_a_difference(runs: tuple[Path, Path], call: Call) -> None:
    flip_a_bit(runs[1] / "checkpoints" / "step-00000006" / "__0_0_0.distcp")
    before = content(runs[1])
    code, out, err = call()
    assert (code, out) == (3, "")
    assert "b/checkpoints/step-00000006 is damaged: __0_0_0.distcp was changed: its hash is wrong" in err
    assert content(runs[1]) == before
    assert call("--no-tensors")[0] == 0


def test_bad_input(runs: tuple[Path, Path], call: Call) -> None:
    assert call("--rtol", "-1")[0] == 2
    (runs[1] / "config.yaml").unlink()
    code, _, err = call()
    assert code == 2
    assert "b is not a run directory" in err
