"""Images as a user classifies them: scikit-learn's digits, and folders of PNG and JPEG files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score

from megatrain.cli.compose import compose
from megatrain.cli.main import main
from megatrain.data.prepare import prepare
from megatrain.data.store import TokenStore

LINE = ("log.wandb=off", "log.display=off", "train.precision=fp32", "data.prefetch=0")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def split_of(store: object) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(store, TokenStore)
    return np.asarray(store.tokens).reshape(-1, 65)[:, :64] / 255, np.asarray(store.labels)


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("model", "steps"), [pytest.param("vit", 400, marks=pytest.mark.slow), ("convnet", 250)]
)
def test_digits_are_told_better_than_by_logistic_regression(place: Path, model: str, steps: int) -> None:
    """On the held-out images, of the same split."""
    assert main(["train", f"experiment=digits_{model}", f"train.steps={steps}", *LINE]) == 0
    data = prepare(
        compose([f"experiment=digits_{model}"]).data, progress=lambda phase, share: None, vocab_size=257
    )
    train, held_out = split_of(data.train), split_of(data.val)
    assert len(train[1]) + len(held_out[1]) == 1797
    assert len(held_out[1]) > 300
    baseline = LogisticRegression(max_iter=2000).fit(*train).score(*held_out)
    assert 0.94 < baseline < 0.98
    assert rows(f"digits-{model}")[-1]["eval/accuracy"] > baseline


def write_digits(folder: Path, which: slice) -> None:
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[which], digits.target[which], strict=True)):
        path = folder / f"digit {label}" / f"{number}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 255 / 16).astype(np.uint8))
        grey.convert("RGB").save(path, quality=95)


def test_a_folder_for_each_class(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no image is counted and named; evaluation gives accuracy, F1 and the confusion matrix."""
    write_digits(place / "train", slice(0, 600))
    write_digits(place / "test", slice(600, 800))
    (place / "train/digit 3/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (place / "train/digit 3/notes.txt").write_text("no image")
    Image.new("RGB", (20, 30)).save(place / "train/digit 4/large.png")
    line = [
        "train",
        "model=convnet",
        "data=images",
        "data.path=train",
        "run.name=mine",
        *LINE,
        "train.steps=60",
    ]
    assert main([*line, "data.images.resize=false"]) == 0
    events = [json.loads(each) for each in Path("runs/mine/events.jsonl").read_text().splitlines()]
    (data,) = [each for each in events if each["event"] == "data"]
    left_out = {each["reason"]: each for each in data["left_out"]}
    assert data["documents"] == 600
    assert left_out["no image that can be read"]["count"] == 2
    assert "digit 3/torn.png" in str(left_out["no image that can be read"])
    assert "digit 4/large.png" in str(left_out["not 8x8 pixels (data.images.resize=false)"])

    capsys.readouterr()
    flags = ["--json", "found.json", "--predictions", "each.jsonl"]
    assert main(["evaluate", "runs/mine", "--labels", "test", *flags]) == 0
    found = json.loads(Path("found.json").read_text())["labels"]
    each = [json.loads(line) for line in Path("each.jsonl").read_text().splitlines()]
    truth, guess = [row["label"] for row in each], [row["predicted"] for row in each]
    assert found["documents"] == len(each) == 200
    assert found["accuracy"] == pytest.approx(np.mean(np.array(truth) == np.array(guess)))
    assert found["accuracy"] > 0.5
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    names = sorted(set(truth))
    assert found["confusion"] == {
        "labels": names,
        "rows_are_true": confusion_matrix(truth, guess, labels=names).tolist(),
    }

    assert main(["generate", "runs/mine", "1"]) == 2
    assert main(["export", "runs/mine", "out"]) == 2
    assert "is not written in Hugging Face's format" in capsys.readouterr().err
    assert main([*line, "run.name=text", "model=vit", "data=text", "seq_len=65"]) == 2
    assert "a model of images needs data=images" in capsys.readouterr().err
