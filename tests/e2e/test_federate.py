"""Runs that train apart meet by the formulas of federated averaging and DiLoCo, worked out here in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from workplace import TINY, Workplace, command

from megatrain.checkpoint.inspect import open_checkpoint
from megatrain.checkpoint.reader import read_tensors
from megatrain.checkpoint.store import Checkpointer
from megatrain.cli.main import main
from megatrain.data.prepare import prepare
from megatrain.train.build import build_loader, build_state
from megatrain.train.files import read_config
from megatrain.train.step import train_step

LINE = (
    *TINY, "train.precision=fp64", "train.eval_every=0", "train.sample_tokens=0", "log.display=off",
    "checkpoint.every=4", "data.val_fraction=0", "schedule=constant",
)  # fmt: skip
WORKERS = ("a", "b", "c", "d")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for n, name in enumerate((*WORKERS, "base")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {k * (n + 2)} = {k}.\n" for k in range(200)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    assert main(["train", *LINE, "data.path=base.txt", "run.name=base", "train.stop_at=2"]) == 0
    assert main(["federate", "start", "runs/base", "runs/server"]) == 0
    return tmp_path


def line(name: str, stop_at: int, *words: str) -> list[str]:
    own = (
        f"data.path={name}.txt",
        f"run.name={name}",
        "checkpoint.adopt=runs/server",
        f"train.stop_at={stop_at}",
    )
    return ["train", *LINE, *own, *words]


def tensors(run: str, step: int) -> dict[str, Tensor]:
    reader = open_checkpoint(Path("runs", run, "checkpoints", f"step-{step:08d}")).reader
    found = {name: torch.empty(spec.size, dtype=spec.dtype) for name, spec in reader.tensor_specs().items()}
    read_tensors(reader, found)
    return found


def weights(run: str, step: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(run, step).items() if name.startswith("model.")}


def tokens(run: str, step: int) -> int:
    state = json.loads(Path("runs", run, "checkpoints", f"step-{step:08d}", "state.json").read_text())
    return int(state["tokens"])


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    "layouts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "layouts"]
)
def test_two_rounds_of_diloco_with_workers_in_different_layouts(place: Path, layouts: bool) -> None:
    """The outer step is Nesterov's; workers take up the round and keep their own optimizer, also in a new layout."""
    for name, steps in zip(WORKERS, (4, 4, 4, 6), strict=True):
        split = ("parallel.dp_shard=2",) if layouts and name == "c" else ()
        run_line(place, line(name, steps, *split))
    theta, ends = weights("server", 0), {"a": 4, "b": 4, "c": 4, "d": 6}
    assert_equal(theta, weights("base", 2))
    rounds = [
        "federate",
        "round",
        "runs/server",
        *(f"runs/{name}" for name in WORKERS),
        "--outer",
        "nesterov",
    ]
    assert main(rounds) == 0
    momentum: dict[str, Tensor] = {}
    for number in (1, 2):
        for name, value in theta.items():
            change = value - sum(weights(worker, ends[worker])[name] for worker in WORKERS) / 4
            momentum[name] = 0.9 * momentum.get(name, torch.zeros(())) + change
            theta[name] = value - 0.7 * (change + 0.9 * momentum[name])
        assert_equal(weights("server", number), theta)
        outer = {
            n.replace("outer.", "model."): t for n, t in tensors("server", number).items() if "outer." in n
        }
        assert_equal(outer, momentum)
        if number == 1:
            first_step = step_from_round("a", 4)
            ends = {name: end + 4 for name, end in ends.items()}
            for name, steps in ends.items():
                split = ("parallel.tp=2",) if layouts and name == "c" else ()
                run_line(place, line(name, steps, *split))
            assert_equal(tensors("a", 5), first_step)
            assert main(rounds) == 0
    assert main(["generate", "runs/server", "a 4 =", "--tokens", "2"]) == 0


def run_line(place: Path, words: list[str]) -> None:
    """Run it in this process, or in as many as its layout has."""
    if any(word.startswith("parallel.") for word in words):
        Workplace(place, place / "a.txt").run(command(*words))
    else:
        assert main([*words, "checkpoint.every=1"] if "run.name=a" in words else words) == 0


def step_from_round(name: str, step: int) -> dict[str, Tensor]:
    """Work out the next step from the worker's own optimizer and the round's weights."""
    cfg = read_config(Path("runs", name))
    state = build_state(cfg, torch.device("cpu"))
    found = Checkpointer(Path("runs", name, "checkpoints"), cfg.checkpoint).load(
        own := state.tensors(), step=step
    )
    assert found is not None
    state.restore(found.state, own)
    for key, value in weights("server", 1).items():
        own[key].copy_(value)
    data = prepare(cfg.data, progress=lambda phase, share: None, vocab_size=cfg.model.vocab_size)
    batch = build_loader(cfg, data.train, None).step_batch(step)
    train_step(state, batch, cfg, lr=cfg.optim.lr * cfg.schedule.factor(step, cfg.train.steps))
    return {key: value.clone() for key, value in state.tensors().items()}


def test_the_mean_counts_tokens_and_strangers_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps in (("a", 4), ("b", 8)):
        assert main(line(name, steps)) == 0
    assert main(["train", *LINE, "data.path=c.txt", "run.name=c", "train.stop_at=4"]) == 0
    assert main(line("d", 4, "optim.lr=1e-2")) == 0
    rounds = ["federate", "round", "runs/server", "runs/a", "runs/b"]
    capsys.readouterr()
    for extra, words in (
        ("runs/c", "runs/c did not start from runs/server"),
        ("runs/d", "runs/d has another config than runs/a: optim.lr"),
        ("runs/a", "runs/a is given twice"),
        ("runs/none", "runs/none is not a run directory"),
    ):
        assert main([*rounds, extra]) == 2
        assert words in capsys.readouterr().err
    assert main(["federate", "round", "runs/a", "runs/b"]) == 2
    assert "runs/a is no server" in capsys.readouterr().err
    shutil.copytree("runs/b", "runs/copy")
    assert main([*rounds, "runs/copy"]) == 2
    assert "runs/copy is given twice" in capsys.readouterr().err
    manifest = Path("runs/server/tokenizer")
    (manifest / "more").write_text("another")
    assert main(rounds) == 2
    assert "another tokenizer" in capsys.readouterr().err
    (manifest / "more").unlink()
    assert [each.name for each in Path("runs/server/checkpoints").iterdir()] == ["step-00000000"]

    assert main(rounds) == 0
    a, b = tokens("a", 4), tokens("b", 8)
    mean = {
        name: (a * value + b * weights("b", 8)[name]) / (a + b) for name, value in weights("a", 4).items()
    }
    assert_equal(weights("server", 1), mean)
    assert main(rounds) == 2  # nobody has taken up round 1
    assert (
        "did not start from the newest round of runs/server (1), but from round 0" in capsys.readouterr().err
    )
    events = [json.loads(each) for each in Path("runs/server/events.jsonl").read_text().splitlines()]
    assert [each["event"] for each in events] == ["federate", "federate"]
    assert main(line("a", 8)) == 0
    resumed = [json.loads(each) for each in Path("runs/a/events.jsonl").read_text().splitlines()]
    assert [each["weights_from"]["step"] for each in resumed if "weights_from" in each] == [0, 1]
