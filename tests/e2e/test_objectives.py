"""Preferences, rewards and a teacher as a user has them: fine-tuned from a run, stopped and resumed, refused."""

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from megatrain.cli.main import main
from megatrain.train.files import read_config

PLAIN = [
    "global_batch_size=8", "micro_batch_size=8", "train.precision=fp32", "log.wandb=off", "log.display=off",
    "data.prefetch=0", "train.sample_tokens=8",
]  # fmt: skip
MODEL = [
    "model.n_layers=2", "model.hidden_size=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16",
    "model.ffn_size=64", "model.vocab_size=257", "data.tokenizer.kind=bytes", "data.path=my.txt", "seq_len=64",
]  # fmt: skip
TUNE = [*PLAIN, "data.val_fraction=0.2", "train.eval_every=10", "train.steps=20", "optim.lr=3e-3"]
DPO = ["objective=dpo", "data=preferences", "data.path=pairs.jsonl"]
GRPO = [
    "objective=grpo", "objective.group_size=4", "objective.answer_tokens=4", "objective.reward=mine.py:digits",
    "objective.kl=0.05", "data.path=sums.jsonl", "seq_len=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("objectives")
    pairs = [
        {"prompt": f"number {n} is ", "chosen": "good", "rejected": "bad" if n % 2 else "awful"}
        for n in range(60)
    ]
    sums = [{"prompt": f"{n % 7}+{n % 5}=", "completion": f"{n % 7 + n % 5}"} for n in range(35)]
    with pytest.MonkeyPatch.context() as patch, chdir(place):
        patch.setenv("MEGATRAIN_CACHE", str(place / "cache"))
        for name, rows in (("pairs", pairs), ("sums", sums)):
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("mine.py").write_text(
            "def digits(prompt, answer, reference):\n    return sum(map(str.isdigit, answer)) / 4\n"
        )
        Path("my.txt").write_text("number 1 is good, bad or awful: 1+2=3\n" * 60)
        assert main(["train", *PLAIN, *MODEL, "train.steps=10", "run.name=base"]) == 0
        yield place


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", [DPO, GRPO], ids=["dpo", "grpo"])
def test_a_stop_changes_nothing(folder: Path, words: list[str]) -> None:
    kind = words[0].removeprefix("objective=")
    assert main(["finetune", "runs/base", *TUNE, *words, f"run.name={kind}-whole"]) == 0
    parts = ["finetune", "runs/base", *TUNE, *words, f"run.name={kind}-parts"]
    assert main([*parts, "train.stop_at=7"]) == 0
    assert main(parts) == 0
    keys = ("train/loss", "train/grad_norm", "data/sample_digest", "eval/loss", "train/tokens")
    whole, resumed = (
        [{key: row.get(key) for key in keys} for row in rows_of(f"{kind}-{end}")]
        for end in ("whole", "parts")
    )
    assert resumed == whole


def test_preferences_are_learned(folder: Path) -> None:
    assert main(["finetune", "runs/base", *TUNE, *DPO, "run.name=preferred"]) == 0
    first, last = rows_of("preferred")[0], rows_of("preferred")[-1]
    assert first["eval/margin"] == 0
    assert last["eval/margin"] > 1
    assert last["eval/accuracy"] == last["train/accuracy"] == 1


def test_rewards_rise(folder: Path) -> None:
    words = ["run.name=rewarded", "train.steps=40", "optim.lr=1e-2", "objective.kl=0"]
    assert main(["finetune", "runs/base", *TUNE, *GRPO, *words]) == 0
    rewards = [row["train/reward"] for row in rows_of("rewarded") if row["step"]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert rows_of("rewarded")[-1]["eval/reward"] == -rows_of("rewarded")[-1]["eval/loss"]


def test_a_small_model_learns_from_a_large_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "objective=distill",
        "objective.teacher=runs/base",
        "objective.alpha=1",
        *PLAIN,
        *MODEL,
        "optim.lr=1e-2",
    ]
    small = ["model.n_layers=1", "train.steps=40", "train.eval_every=20", "run.name=small"]
    assert main(["train", *words, *small, "train.stop_at=20"]) == 0
    assert main(["train", *words, *small]) == 0
    rows = [row["train/loss"] for row in rows_of("small") if row["step"]]
    assert sum(rows[-5:]) < 0.3 * sum(rows[:5])  # the divergence from the teacher
    assert read_config(Path("runs/small")).model.n_layers == 1
    capsys.readouterr()
    assert main(["train", *words, *small, "model.vocab_size=300", "run.name=other"]) == 2
    assert "its model.vocab_size is 257, and must be 300" in capsys.readouterr().err
    assert main(["train", "objective=distill", *PLAIN, *MODEL]) == 2
    assert "objective.teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=dpo", "data.path=pairs.jsonl"], "go together"),
        ([*GRPO, "objective.group_size=3"], "must divide global_batch_size"),
        ([*GRPO, "objective.answer_tokens=16"], "must be below seq_len"),
        ([*GRPO, "objective.reward=mine.py:none"], "has no function none"),
        ([*DPO, "data.path=sums.jsonl"], "no chosen and rejected answer"),
        (["objective=grpo", *DPO[1:]], "go together"),
    ],
)
def test_what_is_refused(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "runs/base", *TUNE, *words, "run.name=refused"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs/refused").exists()


def test_tasks_while_it_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last results are those of `megatrain evaluate` on the same model."""
    Path("choices.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1), "choices": ["1", "2", "3"]}) + "\n"
            for n in (0, 1)
        )
    )
    Path("answers.jsonl").write_text(json.dumps({"prompt": "1+2=", "reference": "3"}) + "\n")
    words = [
        "tasks.choices=choices.jsonl",
        "tasks.answers=answers.jsonl",
        "tasks.answer_tokens=4",
        "tasks.every=6",
    ]
    run = [
        "finetune",
        "runs/base",
        *TUNE,
        "data.path=sums.jsonl",
        "run.name=judged",
        "seq_len=16",
        "train.steps=10",
    ]
    assert main([*run, *words]) == 0
    judged = {row["step"]: row for row in rows_of("judged") if "tasks/choices/accuracy" in row}
    assert list(judged) == [6, 10]
    where = [
        "--choices",
        "choices.jsonl",
        "--answers",
        "answers.jsonl",
        "--tokens",
        "4",
        "--json",
        "found.json",
    ]
    assert main(["evaluate", "runs/judged", *where]) == 0
    found = json.loads(Path("found.json").read_text())
    assert judged[10]["tasks/choices/log_loss"] == pytest.approx(found["choices"]["log_loss"], rel=1e-6)
    assert judged[10]["tasks/answers/chrf"] == pytest.approx(found["answers"]["chrf"], rel=1e-6)
    events = [json.loads(line) for line in Path("runs/judged/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "tasks"] == [6, 10]
    capsys.readouterr()
    assert main([*run, "tasks.choices=nowhere.jsonl", "run.name=refused"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert main([*run, "tasks.every=5", "run.name=refused"]) == 2
    assert "needs a task" in capsys.readouterr().err
    assert not Path("runs/refused").exists()
