"""`megatrain finetune` as a user runs it, in this process: from a run, from a Hugging Face directory, and resumed."""

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from megatrain.cli.compose import Source, compose
from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.config.schema import ConfigError
from megatrain.data.tokenizer import train_bpe
from megatrain.train.files import read_config
from megatrain.train.import_hf import import_once

PLAIN = [
    "train.steps=30", "global_batch_size=8", "micro_batch_size=8", "train.eval_every=30", "train.sample_tokens=8",
    "train.precision=fp32", "optim.lr=1e-2", "log.wandb=off", "log.display=plain", "data.prefetch=0",
]  # fmt: skip
MODEL = [
    "model.n_layers=2", "model.hidden_size=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16",
    "model.ffn_size=64", "model.vocab_size=257",
]  # fmt: skip
BASE = [
    *MODEL,
    "seq_len=64",
    "train.steps=5",
    "data.tokenizer.kind=bytes",
    "data.path=my.txt",
    "run.name=base",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base run, the same as a Hugging Face directory, and examples."""
    place = tmp_path_factory.mktemp("finetune")
    rows = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(80)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "my.txt").write_text("Some text of numbers: 1, 2, 3.\n" * 40)
    with pytest.MonkeyPatch.context() as patch, chdir(place):
        patch.setenv("MEGATRAIN_CACHE", str(place / "cache"))
        assert main(["train", *PLAIN, *BASE]) == 0
        assert main(["export", "runs/base", "exported"]) == 0
        train_bpe(iter(["1 + 1 = 2"]), vocab_size=257).save_pretrained(place / "exported")
        yield place


def finetune(*words: str) -> int:
    return main(["finetune", words[0], "data.path=sums.jsonl", *PLAIN, *words[1:]])


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def test_from_a_run(folder: Path) -> None:
    """It starts from the run's weights, learns what it did not know, and goes on where it stopped."""
    assert finetune("runs/base", "run.name=whole") == 0
    rows = rows_of("whole")
    assert rows[-1]["eval/loss"] < 0.6 * rows[0]["eval/loss"]  # the base's, on the same held-out answers
    start = json.loads(Path("runs/whole/events.jsonl").read_text().splitlines()[0])
    assert start["weights_from"]["step"] == 5
    cfg = read_config(Path("runs/whole"))
    assert (cfg.model, cfg.data.tokenizer.kind) == (read_config(Path("runs/base")).model, "bytes")

    assert finetune("runs/base", "run.name=parts", "train.stop_at=10") == 0
    assert finetune("runs/base", "run.name=parts") == 0
    for row, other in zip(rows_of("parts"), rows, strict=True):
        assert row["train/loss"] == other["train/loss"] if row["step"] else True
        assert row.get("data/sample_digest") == other.get("data/sample_digest")


def test_from_a_hugging_face_directory(folder: Path) -> None:
    assert finetune("exported", "train.steps=2", "train.eval_every=0") == 0
    assert Path("runs/exported/import.json").is_file()
    assert read_config(Path("runs/exported-tuned")).checkpoint.adopt == "runs/exported"
    source = Path("exported")
    assert import_once(source, "runs", progress=lambda phase, share: None) == Path("runs/exported")
    (source / "config.json").touch()
    with pytest.raises(UserError, match="as it was then"):
        import_once(source, "runs", progress=lambda phase, share: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"checkpoint\.adopt: must be given"),
        (["checkpoint.adopt=nowhere"], "must be a run directory"),
        (["checkpoint.adopt=runs/base", "model.n_layers=3"], "can't be changed: it is that of runs/base"),
        (
            ["checkpoint.adopt=runs/base", "data.answer='{a}'"],
            "data.template makes the prompt and data.answer the answer",
        ),
        (["checkpoint.adopt=runs/base", "data.mask_documents=false"], "must be true for examples"),
    ],
)
def test_what_is_refused(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["data.path=sums.jsonl", *words], Source(starts_from_base=True))


def test_its_own_directory_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("runs/base", "run.name=base") == UserError.exit_code
    assert "is the directory of this run itself" in capsys.readouterr().err


def test_privately(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns in spite of the noise, tells epsilon, and goes on where it stopped with the noise that was to come."""
    line = ("runs/base", "run.id=fixed", "privacy.noise_multiplier=0.5", "privacy.max_grad_norm=0.3")
    assert finetune(*line, "run.name=refused") == UserError.exit_code
    assert "MEGATRAIN_KEY" in capsys.readouterr().err
    assert not Path("runs/refused").exists()
    monkeypatch.setenv("MEGATRAIN_KEY", "0123456789abcdef" * 4)
    assert finetune(*line, "run.name=private") == 0
    rows = rows_of("private")
    assert rows[-1]["eval/loss"] < 0.9 * rows[0]["eval/loss"]
    epsilons = [row["privacy/epsilon"] for row in rows[1:]]
    assert 1 < epsilons[0] <= epsilons[-1]
    assert all(row["privacy/epsilon_poisson"] > 0 for row in rows[1:])
    assert finetune(*line, "run.name=stopped", "train.stop_at=3") == 0
    assert finetune(*line, "run.name=stopped") == 0
    assert main(["checkpoint", "diff", "runs/private", "runs/stopped"]) == 0  # bitwise equal
