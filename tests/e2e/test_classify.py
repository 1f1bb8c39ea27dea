"""Classification as a user runs it: fine-tuned from a run, evaluated, resumed, exported to transformers."""

import json
import random
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from served import Served
from transformers import AutoModelForSequenceClassification

from megatrain.cli.main import main
from megatrain.data.tokenizer import train_bpe
from megatrain.runtime.processes import Processes
from megatrain.train.files import read_config
from megatrain.train.inference import load_trained

PLAIN = [
    "global_batch_size=8", "micro_batch_size=8", "train.precision=fp32", "log.wandb=off", "log.display=off",
    "data.prefetch=0", "train.sample_tokens=8", "seq_len=64",
]  # fmt: skip
MODEL = [
    "model.n_layers=2", "model.hidden_size=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16",
    "model.ffn_size=64", "model.vocab_size=257", "data.tokenizer.kind=bytes", "data.path=my.txt",
]  # fmt: skip
TUNE = [*PLAIN, "data=classify", "data.val_fraction=0.2", "optim.lr=1e-2", "train.eval_every=20"]
WORDS = {"positive": ("good", "great", "fine"), "negative": ("bad", "awful", "poor"), "neutral": ("so-so",)}


def reviews(count: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        label = chance.choices(list(WORDS), [6, 3, 1])[0]
        filler = " ".join(chance.choices(["the", "film", "was", "a", "plot"], k=chance.randint(1, 5)))
        rows.append({"text": f"{filler} {chance.choice(WORDS[label])}", "label": label})
    return rows


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("classify")
    with pytest.MonkeyPatch.context() as patch, chdir(place):
        patch.setenv("MEGATRAIN_CACHE", str(place / "cache"))
        Path("my.txt").write_text("the film was good and bad\n" * 100)
        write("reviews.jsonl", reviews(200))
        tags = [
            {"text": row["text"], "labels": [row["label"], "all"][: n % 3]}
            for n, row in enumerate(reviews(60))
        ]
        write("tags.jsonl", tags)
        assert main(["train", *PLAIN, *MODEL, "train.steps=3", "run.name=base"]) == 0
        yield place


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def test_one_label(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "data.path=reviews.jsonl",
        "run.name=one",
        "model.classifier.class_weights=balanced",
        "train.steps=60",
    ]
    assert main(["finetune", "runs/base", *TUNE, *words, "train.stop_at=30"]) == 0
    assert main(["finetune", "runs/base", *TUNE, *words]) == 0
    classifier = read_config(Path("runs/one")).model.classifier
    assert classifier is not None
    assert classifier.labels == ("negative", "neutral", "positive")
    assert isinstance(classifier.class_weights, tuple)
    last = rows_of("one")[-1]
    assert last["eval/accuracy"] > 0.9
    assert "eval/bits_per_byte" not in last
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                "runs/one",
                "--labels",
                "reviews.jsonl",
                "--predictions",
                "p.jsonl",
                "--json",
                "r.json",
            ]
        )
        == 0
    )
    found = json.loads(Path("r.json").read_text())["labels"]
    predicted = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    right = sum(row["label"] == row["predicted"] for row in predicted)
    assert found["accuracy"] == right / len(predicted) > 0.9
    assert sum(map(sum, found["confusion"]["rows_are_true"])) == 200
    assert "predicted as" in capsys.readouterr().out


def test_transformers_computes_the_same(folder: Path) -> None:
    words = ["data.path=reviews.jsonl", "run.name=exported", "train.steps=20"]
    assert main(["finetune", "runs/base", *TUNE, *words]) == 0
    assert main(["export", "runs/exported", "theirs", "--check"]) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained("theirs", dtype=torch.float32)
    assert theirs.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    trained = load_trained(Path("runs/exported"), Processes())
    ids = torch.tensor([[*b"the film was good", 256]])
    with torch.no_grad():
        ours = trained.parallel.models[0](ids)[0, -1]
        torch.testing.assert_close(ours, theirs(ids).logits[0], rtol=1e-5, atol=1e-5)
    train_bpe(iter(["the film"]), vocab_size=257).save_pretrained(Path("theirs"))
    again = ["data.path=reviews.jsonl", "run.name=again", "train.steps=1", "train.eval_every=0"]
    assert main(["finetune", "theirs", *TUNE, *again]) == 0
    classifier = read_config(Path("runs/again")).model.classifier
    assert classifier is not None
    assert classifier.labels == ("negative", "neutral", "positive")


def test_a_classifier_is_served(folder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained("theirs", dtype=torch.float32)
    texts = ["the film was good", "bad", ""]
    with Served(Path("runs/exported")) as served:
        found = served.post("classify", {"input": texts}).json()
        refused = served.post("classify", {"input": texts, "choices": ["a", "b"]}).json()["error"]
        generated = served.post("completions", {"prompt": "the"}).json()["error"]
    assert found["labels"] == ["negative", "neutral", "positive"]
    for text, row in zip(texts, found["data"], strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([[*text.encode(), 256]])).logits[0]
        assert row["logprobs"] == pytest.approx(expected.log_softmax(0).tolist(), abs=1e-4)
        assert row["label"] == found["labels"][int(expected.argmax())]
    assert "labels of its own" in refused["message"]
    assert "is a classifier" in generated["message"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
@pytest.mark.filterwarnings("ignore:.*newly initialized.*")
def test_several_labels_and_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.path=tags.jsonl", "run.name=tags", "train.steps=40", "lora.rank=4", "lora.alpha=32"]
    assert main(["finetune", "runs/base", *TUNE, *words]) == 0
    rows = rows_of("tags")
    assert rows[-1]["eval/loss"] < 0.8 * rows[0]["eval/loss"]
    assert main(["evaluate", "runs/tags", "--labels", "tags.jsonl", "--json", "t.json"]) == 0
    assert json.loads(Path("t.json").read_text())["labels"]["micro_f1"] > 0.6
    assert main(["export", "runs/tags", "merged", "--merge", "--check"]) == 0
    assert main(["export", "runs/tags", "adapters"]) == 0
    assert main(["export", "runs/base", "language-model"]) == 0
    ids = torch.tensor([[*b"the film was good", 256]])
    plain = AutoModelForSequenceClassification.from_pretrained(
        "language-model", num_labels=4, dtype=torch.float32
    )
    merged = AutoModelForSequenceClassification.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(plain, "adapters").eval()(ids).logits
        torch.testing.assert_close(adapted, merged.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["evaluate", "runs/tags", "--labels", "reviews.jsonl"]) == 2
    assert "gives each text a list of labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=one.jsonl"], "The data has 1 label (a), and a classifier needs two"),
        (["data.path=reviews.jsonl", "model.classifier.labels=[positive,negative]"], "does not name: neutral"),
        (["data.path=reviews.jsonl", "model.classifier.multi_label=true"], "the rows of the data have one label"),
        (["data.path=reviews.jsonl", "model.classifier.lables=[a]"], "model.classifier.lables"),
        (["data.path=reviews.jsonl", "data=chat"], "examples"),
        (["data.path=reviews.jsonl", "model.classifier.class_weights=[1,2]"], "has 2 numbers, and there are 3 labels"),
    ],
)  # fmt: skip
def test_what_is_refused(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("one.jsonl", [{"text": f"row {n}", "label": "a"} for n in range(5)])
    assert main(["finetune", "runs/base", *TUNE, "run.name=refused", "train.steps=2", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs/refused").exists()


def test_what_a_classifier_cannot_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["finetune", "runs/base", *TUNE, "data.path=reviews.jsonl", "run.name=c", "train.steps=1"]) == 0
    )
    capsys.readouterr()
    assert main(["generate", "runs/c", "a"]) == 2
    assert main(["evaluate", "runs/c", "--text", "my.txt"]) == 2
    assert main(["evaluate", "runs/base", "--labels", "reviews.jsonl"]) == 2
    said = capsys.readouterr().err
    assert said.count("is a classifier, which predicts labels") == 2
    assert "--labels needs a classifier" in said


def test_a_head_is_kept_for_the_same_labels_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a head stand for labels by their order: those of others would be wrong without a word."""
    words = ["data.path=reviews.jsonl", "train.steps=30"]
    assert main(["finetune", "runs/base", *TUNE, *words, "run.name=source"]) == 0
    further = [*words, "train.steps=1", "optim.lr=1e-9"]
    assert main(["finetune", "runs/source", *TUNE, *further, "run.name=further"]) == 0
    assert rows_of("further")[0]["eval/loss"] == pytest.approx(rows_of("source")[-1]["eval/loss"], rel=1e-5)
    adapters = [*further, "run.name=adapted", "lora.rank=2"]
    assert main(["finetune", "runs/source", *TUNE, *adapters]) == 0
    assert rows_of("adapted")[0]["eval/loss"] == pytest.approx(rows_of("source")[-1]["eval/loss"], rel=1e-5)
    other = "model.classifier.labels=[positive,neutral,negative]"
    assert main(["finetune", "runs/source", *TUNE, *further, other, "run.name=other"]) == 0
    assert rows_of("other")[0]["eval/loss"] > 0.5  # a random head
    events = Path("runs/other/events.jsonl").read_text()
    assert "The classifier's head begins anew" in events
    assert "begins anew" not in Path("runs/further/events.jsonl").read_text()
