"""What people find in their data, planted: each does what the documentation says, through the command line."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.cli.main import main
from megatrain.data.store import read_index

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "bake", "bread")


def paragraph(seed: int, length: int = 120) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(length))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    return tmp_path


def prepare(*overrides: str) -> int:
    words = ["data.path=in", "data.tokenizer.kind=bytes", "data.val_fraction=0"]
    return main(["data", "prepare", *words, *overrides])


def prepared(folder: Path) -> tuple[dict[str, object], list[str]]:
    """Return the index of the only cache, and its documents."""
    (directory,) = (each for each in (folder / "cache").iterdir() if (each / "index.json").exists())
    index = read_index(directory)
    assert index is not None
    tokens = np.fromfile(directory / "train.tokens", "<u2")
    starts = np.fromfile(directory / "train.documents", "<i8")
    return index, [part[:-1].astype(np.uint8).tobytes().decode() for part in np.split(tokens, starts[1:])]


def reasons(index: dict[str, object]) -> dict[str, int]:
    return {group["reason"]: group["count"] for group in index["left_out"]}


def rows(name: str, texts: list[object]) -> None:
    Path("in", name).write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )


def test_duplicates_near_duplicates_and_contaminated_documents(folder: Path) -> None:
    originals = [paragraph(seed) for seed in range(30)]
    near = [" ".join([*text.split()[:-1], "changed"]) for text in originals[:5]]  # one word of 120
    question = "which of these seven wizards was the first to cross the old stone bridge at night"
    contaminated = [f"{paragraph(100)} {question} {paragraph(101)}", f"{question.upper()}!"]
    rows("a.jsonl", originals)
    rows("b.jsonl", [*originals[10:14], *near, *contaminated])
    Path("exam.jsonl").write_text(json.dumps({"question": question}) + "\n")
    steps = "{kind:decontaminate,against:[exam.jsonl],ngram:13},exact_duplicates,{kind:near_duplicates,threshold:0.8}"
    assert prepare(f"data.clean=[{steps}]") == 0
    index, documents = prepared(folder)
    assert documents == originals
    removed = {step["kind"]: sum(step["removed"].values()) for step in index["cleaning"]["steps"]}
    assert removed == {"decontaminate": 2, "exact_duplicates": 4, "near_duplicates": 5}


def test_broken_text_beside_good_text(folder: Path) -> None:
    Path("in/good.txt").write_text("good text")
    Path("in/latin.txt").write_bytes("größer".encode("latin-1"))
    Path("in/nul.txt").write_bytes(b"text\0with NUL")
    rows("nul.jsonl", ["text\0with NUL"])
    assert prepare() == 0
    index, documents = prepared(folder)
    assert documents == ["good text", "text\0with NUL"]
    assert reasons(index) == {"not UTF-8": 1, "not text, .txt": 1}


def test_a_broken_line_names_its_place_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows("a.jsonl", ["good"] * 40)
    with open("in/a.jsonl", "ab") as stream:
        stream.write(b'{"text": "\xff"}\n')
    assert prepare() == 2
    assert "in/a.jsonl:41 is not UTF-8: byte 0xff at offset" in capsys.readouterr().err
    assert [each for each in (folder / "cache").iterdir() if each.is_dir()] == []


def test_shards_without_rows(folder: Path) -> None:
    rows("a.jsonl", ["text"])
    Path("in/b.jsonl").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "in/c.parquet")
    Path("in/d.csv").write_text("text,id\n")
    Path("in/e.json").write_text("[]")
    assert prepare() == 0
    index, documents = prepared(folder)
    assert documents == ["text"]
    assert reasons(index) == {"empty": 4}
    assert prepare("data.on_skip=error") == 2


@pytest.mark.slow
def test_a_line_of_100_megabytes(folder: Path) -> None:
    long = "".join(f"word{n} " for n in range(9_000_000))
    rows("a.jsonl", ["short", long, "also short"])
    assert prepare() == 0
    _, documents = prepared(folder)
    assert documents == ["short", long, "also short"]
