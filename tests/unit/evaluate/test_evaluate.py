"""Scores are those of the whole model, metrics those of tables worked out by hand, and the harness agrees."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics.test_export import exported, make_run
from numerics.test_huggingface_parity import MODELS

from megatrain.cli.main import main
from megatrain.config.errors import UserError
from megatrain.evaluate.answers import Task, compare
from megatrain.evaluate.choices import by_label, metrics, read_questions
from megatrain.evaluate.perplexity import perplexity, windows
from megatrain.runtime.processes import Processes
from megatrain.train.inference import TrainedModel, load_trained
from megatrain.train.scoring import Scorer

TEXT = "the square of the number of the square"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", MODELS["qwen3"])


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return load_trained(run, Processes(), average=False)


def log_likelihood(trained: TrainedModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """The same by a plain pass over one text."""
    inputs = (before + after)[:-1][-trained.context :]
    with torch.no_grad():
        logs = trained.parallel.models[0](torch.tensor([inputs]))[0].log_softmax(-1)[-len(after) :]
    nats = sum(float(logs[n, token]) for n, token in enumerate(after))
    return nats, logs.argmax(-1).tolist() == after


def test_scores_are_those_of_each_text_alone(trained: TrainedModel) -> None:
    """Texts of several lengths in one pass, longer than the model sees, one of which is the greedy continuation."""
    generator = torch.Generator().manual_seed(2)
    pairs = [
        (
            torch.randint(300, (n % 23 + 1,), generator=generator).tolist(),
            torch.randint(300, (n % 7,), generator=generator).tolist(),
        )
        for n in range(40)
    ]
    with torch.no_grad():
        best = int(trained.parallel.models[0](torch.tensor([[5, 6, 7]]))[0, -1].argmax())
    pairs.append(([5, 6, 7], [best]))
    found = Scorer(trained).scores(pairs)
    for score, (before, after) in zip(found, pairs, strict=True):
        nats, is_greedy = log_likelihood(trained, before, after) if after else (0.0, True)
        assert score.nats == pytest.approx(nats, abs=1e-4)
        assert score.is_greedy == is_greedy
    assert found[-1].is_greedy
    with pytest.raises(UserError, match="17 tokens"):
        Scorer(trained).scores([([1], [1] * 17)])


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 30])
def test_windows_predict_each_token_once(length: int, stride: int) -> None:
    tokens = list(range(100, 100 + length))
    pairs = list(windows(tokens, 5, context=8, stride=stride))
    assert [token for _, after in pairs for token in after] == tokens
    for before, after in pairs:
        text = [5, *tokens]
        place = text.index(after[0])
        assert before == text[place - len(before) : place]
        assert len(before) >= 1
        assert len(before) + len(after) - 1 <= 8
    if length == 30 and stride == 1:
        assert all(len(before) == 8 for before, _ in pairs[1:])


def test_perplexity(trained: TrainedModel, tmp_path: Path) -> None:
    rows = [TEXT * n for n in range(1, 5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    options: dict[str, Any] = {"field": "body", "progress": lambda *_: None}
    found = perplexity(Scorer(trained), [str(tmp_path / "x.jsonl")], stride=5, **options)
    nats, tokens = 0.0, 0
    for row in rows:
        ids = trained.tokenizer.encode(row)
        tokens += len(ids)
        text = [trained.tokenizer.eos_id, *ids]
        for start in (1, *range(17, len(text), 5)):
            end = min(len(text), start + (16 if start == 1 else 5))
            nats -= log_likelihood(trained, text[max(0, end - 17) : start], text[start:end])[0]
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("".join(rows)), rel=1e-5)


def test_choices_are_cut_where_the_text_has_tokens(trained: TrainedModel) -> None:
    scorer, encode = Scorer(trained), trained.tokenizer.encode
    before, after = scorer.encode("the square ", "of")
    assert before + after == encode("the square of")
    assert before == encode("the square")
    assert scorer.encode("", "the") == ([trained.tokenizer.eos_id], encode("the"))


def test_metrics_of_a_table() -> None:
    """Ten questions of two answers: the true ones, the guesses, and how sure the model was."""
    truth = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    first = [0.9, 0.8, 0.75, 0.65, 0.6, 0.3, 0.2, 0.15, 0.65, 0.55]
    nats = [np.log(np.array([p, 1 - p])) - 3 for p in first]
    found = metrics(nats, truth)
    assert found["accuracy"] == pytest.approx(0.7)
    chosen = [p if t == 0 else 1 - p for p, t in zip(first, truth, strict=True)]
    assert found["log_loss"] == pytest.approx(-np.log(chosen).mean())
    sure = [(float((p > 0.5) == (t == 0)), max(p, 1 - p)) for p, t in zip(first, truth, strict=True)]
    assert found["brier_score"] == pytest.approx(np.mean([(right - p) ** 2 for right, p in sure]))
    assert sum(each["questions"] for each in found["calibration"]) == 10
    table = by_label(["no", "yes"], truth, [0 if p > 0.5 else 1 for p in first])
    assert table["confusion"]["rows_are_true"] == [[5, 1], [2, 2]]
    assert table["labels"]["no"] == pytest.approx(
        {"precision": 5 / 7, "recall": 5 / 6, "f1": 10 / 13, "support": 6}
    )
    assert table["labels"]["yes"] == pytest.approx(
        {"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "support": 4}
    )
    assert table["macro_f1"] == pytest.approx((10 / 13 + 4 / 7) / 2)


def test_calibration_of_answers_that_are_as_right_as_sure() -> None:
    """Of ten answers with confidence 0.8 eight are right; then of ten with 1.0 none is."""
    sure = [np.log(np.array([0.8, 0.2]))] * 10
    assert metrics(sure, [0] * 8 + [1] * 2)["calibration_error"] == pytest.approx(0, abs=1e-12)
    blind = [np.array([0.0, -800.0])] * 10
    found = metrics(sure + blind, [0] * 8 + [1] * 12)
    assert found["calibration_error"] == pytest.approx(0.5)
    assert math.isfinite(found["log_loss"])


def test_generated_answers_are_compared() -> None:
    tasks = [Task("", ("the cat sat on the mat",)), Task("", ("a dog", "one dog barks loudly today"))]
    same = compare(["the cat sat on the mat", "one dog barks loudly today"], tasks)
    assert (same["exact_match"], same["rougeL"], same["rouge2"]) == (1.0, 1.0, 1.0)
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    other = compare(["the cat", ""], tasks)
    assert other["exact_match"] == 0
    assert other["rouge1"] == pytest.approx((2 * 2 / (2 + 6)) / 2)  # precision 1, recall 1/3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "x.jsonl:1 is not JSON"),
        ("[]", "not a JSON object"),
        ('{"prompt": "a"}', "at least two different choices"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "none of the choices"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "none of the choices"),
        ('{"prompt": "a", "choices": ["b", 1], "answer": 0}', "list of texts"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 1}', "'prompt' is missing"),
        ("", "no rows"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        read_questions(tmp_path / "x.jsonl")


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the run, what is exported of it, and tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    exported(run, tmp_path / "exported")
    (tmp_path / "my.txt").write_text(TEXT)  # of no more tokens than the run's sequences have
    rows = [("the square of", " the"), ("the number", " of"), ("the", " square"), ("of", " the")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": a, "answer": b}) + "\n" for a, b in rows))
    (tmp_path / "a.jsonl").write_text('{"prompt": "the", "reference": "square"}\n')
    return tmp_path


def test_a_run_and_what_is_exported_of_it_are_equal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text", "my.txt", "--choices", "q.jsonl", "--answers", "a.jsonl", "--tokens", "4"]
    assert main(["evaluate", "run", "--no-average", *words, "--json", "ours.json"]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", "exported", *words, "--json", "-"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    ours = json.loads(Path("ours.json").read_text())
    assert (ours["step"], theirs["step"]) == (3, None)
    for part in ("text", "choices", "answers"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[part][name], rel=1e-4), name
    assert "perplexity" in table
    assert "predicted as" in table
    assert ours["choices"]["questions"] == 4
    assert set(ours["choices"]["labels"]) == {" the", " of", " square"}


WRONG = {
    "nothing to do": (["run"], "say what to evaluate on"),
    "no such run": (["nowhere", "--text", "my.txt"], "neither a run directory nor"),
    "no such text": (["run", "--text", "absent.txt"], "absent.txt"),
    "no such file": (["run", "--choices", "absent.jsonl"], "absent.jsonl"),
    "a stride of nothing": (["run", "--text", "my.txt", "--stride", "0"], "--stride 0: must be at least 1"),
    "a stride beyond the context": (["run", "--text", "my.txt", "--stride", "99"], "at most 16"),
    "no such flag": (["run", "--txt", "my.txt"], "--txt"),
    "no such task": (["run", "--tasks", "none", "--task-dir", "absent"], "no such directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, said = WRONG[name]
    assert main(["evaluate", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
