"""`megatrain compress` on a run that has learned something: its report, what reads its output, and wrong input."""

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from megatrain.cli.main import main

SMALL = (
    "model.n_layers=2", "model.hidden_size=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16",
    "model.ffn_size=64", "model.vocab_size=300", "model.max_seq_len=32", "seq_len=32", "global_batch_size=8",
    "micro_batch_size=8", "train.sample_tokens=0", "train.precision=fp32", "schedule.warmup_steps=0", "data.prefetch=0",
    "model.sliding_window=null", "model.full_attention_every=null", "log.wandb=off", "log.display=plain",
    "train.eval_tokens=512", "data.val_fraction=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a trained run, the same as a Hugging Face directory, and text."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setenv("MEGATRAIN_CACHE", str(folder / "cache"))
        rows = [
            {"text": f"Line {n}: the square of {n} is {n * n}, and its half {n / 2}. " * 3}
            for n in range(400)
        ]
        Path("lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("other.txt").write_text(
            "\n".join(f"Line {n}: the square of {n} is {n * n}." for n in range(900, 960))
        )
        assert main(["train", "data.path=lines.jsonl", "run.name=mine", "train.steps=60", *SMALL]) == 0
        assert main(["export", "runs/mine", "exported"]) == 0
        yield folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for each test, with the run in it."""
    monkeypatch.setenv("MEGATRAIN_CACHE", str(place / "cache"))
    for each in place.iterdir():
        if each.name != "cache":
            (shutil.copytree if each.is_dir() else shutil.copy)(each, tmp_path / each.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*words: str) -> dict[str, Any]:
    assert main(["compress", *words, "--json", "report.json"]) == 0
    found: dict[str, Any] = json.loads(Path("report.json").read_text())
    return found


def evaluated(model: str, text: str = "other.txt") -> dict[str, Any]:
    assert main(["evaluate", model, "--text", text, "--json", "evaluated.json"]) == 0
    found: dict[str, Any] = json.loads(Path("evaluated.json").read_text())["text"]
    return found


@pytest.mark.parametrize(
    ("method", "most"), [("int8", 0.005), ("int8-dynamic", 0.02), ("int4-awq", 0.2), ("wanda", 2.0)]
)
def test_report_is_what_evaluate_says_of_both_models(
    here: Path, capsys: pytest.CaptureFixture[str], method: str, most: float
) -> None:
    found = report("runs/mine", "out", "--method", method, "--text", "other.txt")
    before, after = found["before"]["text"], found["after"]["text"]
    assert before["loss"] == pytest.approx(evaluated("runs/mine")["loss"], abs=1e-6)
    assert after["loss"] == pytest.approx(evaluated("out")["loss"], abs=1e-5)
    assert -0.1 < after["perplexity"] / before["perplexity"] - 1 < most
    assert found["bytes"]["on_disk"] == (here / "out" / "model.safetensors").stat().st_size
    assert 0 <= found["bytes"]["tensors"] - found["bytes"]["after"] <= 16 * 14  # shapes of packed matrices
    assert all(found["after"][key] > 0 for key in ("scored_tokens_per_sec", "generated_tokens_per_sec"))
    capsys.readouterr()
    assert main(["generate", "out", "Line 7", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Line 7")


def test_text_that_the_run_has_held_out_is_shared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One part calibrates, and the other measures: the same for every method, and in the table."""
    reports = [report("runs/mine", name, "--method", name) for name in ("int4", "int4-gptq")]
    assert reports[0]["before"]["text"] == reports[1]["before"]["text"]
    assert reports[1]["after"]["text"]["loss"] < reports[0]["after"]["text"]["loss"]
    assert reports[1]["calibration"] == "the run's own text"
    assert "calibration" not in reports[0]
    assert reports[0]["group"] == 32
    table = capsys.readouterr().out
    assert "perplexity" in table
    assert "bits per byte" in table
    assert f"{reports[0]['bytes']['after']:,}" in table


def test_a_pruned_model_heals(here: Path) -> None:
    found = report("exported", "pruned", "--method", "prune", "--heads", "1", "--ffn", "40",
                   "--calibration", "lines.jsonl", "--text", "lines.jsonl")  # fmt: skip
    assert found["after"]["parameters"] < 0.8 * found["before"]["parameters"]
    hurt = found["after"]["text"]["loss"]
    assert hurt > found["before"]["text"]["loss"] + 0.05
    assert main(["import", "pruned", "run.name=healed"]) == 0
    short = [word for word in SMALL if not word.startswith("model.")]
    healing = ["run.name=healed", "data.path=lines.jsonl", "train.steps=30", "optim.lr=3e-3"]
    assert main(["train", *healing, *short, "train.allow_changes=[*]"]) == 0
    assert evaluated("runs/healed", "lines.jsonl")["loss"] < hurt - 0.05


def test_weights_of_a_quantized_directory_can_be_trained_on(here: Path) -> None:
    report("runs/mine", "small", "--method", "int4-gptq", "--text", "other.txt")
    assert main(["import", "small", "run.name=again"]) == 0
    assert evaluated("runs/again")["loss"] == pytest.approx(evaluated("small")["loss"], abs=1e-6)


WRONG = {
    "no such method": (["--method", "int44"], "Did you mean int4"),
    "group": (["--method", "int4", "--group", "128"], "divides the inputs of every layer"),
    "group of another method": (["--method", "int8", "--group", "32"], "--group belongs to"),
    "sparsity": (["--method", "wanda", "--sparsity", "1.5"], "above 0 and below 1"),
    "sparsity of none": (["--method", "magnitude", "--sparsity", "0"], "above 0 and below 1"),
    "sparsity of 2:4": (["--method", "wanda-2:4", "--sparsity", "0.5"], "--sparsity belongs to"),
    "pruning without sizes": (["--method", "prune"], "needs --heads N"),
    "heads": (["--method", "prune", "--heads", "5"], "from 1 to 2"),
    "samples": (["--method", "wanda", "--samples", "0"], "at least 1"),
    "no method": ([], "--method"),
    "text that is not there": (["--method", "wanda", "--calibration", "gone.txt"], "gone.txt"),
    "text that is not needed": (["--method", "int8", "--calibration", "other.txt"], "needs no text"),
    "format": (["--method", "fp8", "--format", "gguf"], "as int8"),
    "tied head": (["--method", "int8", "--head"], "share their weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    words, said = WRONG[case]
    before = sorted(here.rglob("*"))
    assert main(["compress", "runs/mine", "out", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_places_that_do_not_fit_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(["compress", *words]) == 2
        return capsys.readouterr().err

    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert "exists already" in refused("runs/mine", "full", "--method", "int8")
    assert "neither a run directory" in refused("nowhere", "out", "--method", "int8")
    assert "needs calibration text" in refused("exported", "out", "--method", "int4-gptq")
    shutil.rmtree(here / "runs" / "mine" / "checkpoints")
    assert "no checkpoint" in refused("runs/mine", "out", "--method", "int8")
    assert not (here / "out").exists()


def test_a_directory_without_text_is_compressed_and_not_measured(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report("exported", "out", "--method", "fp8")
    assert "text" not in found["before"]
    assert "add --text PATH" in capsys.readouterr().out


def test_a_gguf_file_is_new_and_appears_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report("runs/mine", "tiny.gguf", "--format", "gguf", "--method", "int4-gptq")
    assert found["bytes"]["on_disk"] == (here / "tiny.gguf").stat().st_size
    assert found["bytes"]["on_disk"] > found["bytes"]["tensors"]
    assert not list(here.glob(".tiny*"))
    assert main(["compress", "runs/mine", "tiny.gguf", "--format", "gguf", "--method", "int8"]) == 2
    assert "exists already" in capsys.readouterr().err
