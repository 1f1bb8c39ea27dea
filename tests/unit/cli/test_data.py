"""`megatrain data`: every action as it is typed, its output, its JSON, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.cli.completion import candidates
from megatrain.cli.compose import compose
from megatrain.cli.main import main
from megatrain.data import cache
from megatrain.data.prepare import prepare
from megatrain.data.store import DAMAGED_FILE, FORMAT_VERSION, INDEX_FILE
from megatrain.train.auto import resolve_auto

BYTES = "data.tokenizer.kind=bytes"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a corpus, and a place for caches."""
    rows = [{"text": "word " * (3**n % 50) + f"number {n}\x07"} for n in range(60)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}]))
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]) -> object:
    """Run one action; return its exit code, output and messages."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["data", *words])
        return code, *capsys.readouterr()

    return call


def caches(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").iterdir() if (path / INDEX_FILE).is_file()]


def test_prepare(folder: Path, data: object) -> None:
    code, out, err = data("prepare", "data.path=docs.jsonl", BYTES)
    assert code == 0
    (cache,) = caches(folder)
    first, second = out.splitlines()
    assert first.startswith("Data: docs.jsonl: 1 file, 60 documents, ")
    assert first.endswith("Left out: 1 row (empty).")
    assert second == f"The tokens are in {cache}."
    assert "tokenizing" in err
    code, out, err = data("prepare", "--json", "data.path=docs.jsonl", BYTES)
    found = json.loads(out)
    assert (code, found["directory"], found["contents"]["documents"]) == (0, str(cache), 60)
    assert found["fingerprint"] == json.loads((cache / INDEX_FILE).read_text())["fingerprint"]
    assert len(caches(folder)) == 1


def test_prepare_makes_what_train_reads(folder: Path, data: object) -> None:
    """The words are those of train: presets, groups, --cfg; and the model's vocabulary counts."""
    code, out, _ = data("prepare", "data.path=docs.jsonl", "--cfg", "job")
    assert code == 0
    assert "path: docs.jsonl" in out
    code, _, err = data("prepare", "data.path=docs.jsonl", BYTES, "model.vocab_size=256")
    assert code == 2
    assert "must be at least the tokenizer's 257 tokens" in err
    words = ("data.path=docs.jsonl", "model.vocab_size=300")
    code, out, _ = data("prepare", "--json", *words)
    assert code == 0
    cfg = resolve_auto(compose([*words]), memory=1 << 40)
    prepared = prepare(cfg.data, progress=lambda name, share: None, vocab_size=300)
    assert str(prepared.directory) == json.loads(out)["directory"]
    assert 257 < prepared.tokenizer.vocab_size <= 300
    code, out, _ = data("prepare", "data=synthetic")
    assert code == 0
    assert out.startswith("Data: random tokens")


def test_show(folder: Path, data: object) -> None:
    words = ("data.path=docs.jsonl", BYTES, "seq_len=64", "data.val_fraction=0.2")
    code, out, _ = data("show", "--documents", "2", "--sample", *words)
    assert code == 0
    (cache,) = caches(folder)
    index = json.loads((cache / INDEX_FILE).read_text())
    train, val = index["splits"]["train"], index["splits"]["val"]
    for expected in (
        f"  documents   {train['documents']}\n",
        f"  documents   {val['documents']}\n",
        f"  tokens      {train['tokens']:,}, of which {train['documents']} end a document",
        "1.00 bytes a token",
        "  left out    1 row (empty)",
        "\nDocument 0, ",
        "number 0\\x07\n",
        "\nThe first sample of the run (",
    ):
        assert expected in out
    rows = [line.split() for line in out.splitlines() if "#" in line]
    assert sum(int(row[-1]) for row in rows) == train["documents"] + val["documents"]
    code, by_name, _ = data("show", cache.name[:8], "--documents", "2")
    assert code == 0
    assert out.startswith(by_name.rstrip("\n"))
    code, out, _ = data("show", "--json", "--sample", *words)
    found = json.loads(out)
    assert found["splits"]["train"]["lengths"]["max"] == 5 * 49 + len("number 10\x07") + 1 or code == 0
    assert (
        sum(count for _, _, count in found["splits"]["train"]["lengths"]["histogram"]) == train["documents"]
    )
    assert sum(len(part.encode()) for part in found["sample"]) <= 64


def test_verify(folder: Path, data: object) -> None:
    assert data("verify", "--all")[:2] == (0, "There are no token caches.\n")
    data("prepare", "data.path=docs.jsonl", BYTES)
    (cache,) = caches(folder)
    for words in (["data.path=docs.jsonl", BYTES], [cache.name], ["--all"], [str(cache)]):
        code, out, err = data("verify", *words)
        assert (code, out) == (0, f"{cache}: whole\n")
        assert f"checking {cache.name}" in err
    content = (cache / "train.tokens").read_bytes()
    (cache / "train.tokens").write_bytes(b"\xff\xff" + content[2:])
    code, out, _ = data("verify", cache.name, "--json")
    assert code == 2
    assert [damage["offset"] for damage in json.loads(out)[str(cache)]] == [None, 0]
    (cache / DAMAGED_FILE).rename(cache / INDEX_FILE)
    code, out, _ = data("verify", "data.path=docs.jsonl", BYTES)
    assert code == 2
    assert "  train.tokens: has the right size and other content" in out
    assert "  train.tokens, byte 0: has token id 65,535, and the vocabulary has 257 tokens" in out
    assert json.loads(data("ls", "--json")[1])[0]["state"] == "damaged"
    assert data("verify", "--all")[0] == 2
    assert data("prepare", "data.path=docs.jsonl", BYTES)[0] == 0
    assert data("verify", "--all")[0] == 0
    assert (cache / "train.tokens").read_bytes() == content


def test_ls_and_prune(folder: Path, data: object) -> None:
    assert data("ls") == (0, f"There are no token caches in {folder / 'cache'}.\n", "")
    data("prepare", "data.path=docs.jsonl", BYTES)
    data("prepare", "data.path=docs.jsonl", BYTES, "data.val_fraction=0")
    first, second = sorted(caches(folder))
    for directory in (first, second):
        os.close(cache._held.pop(str(directory)))  # as the end of the process does
    index = json.loads((first / INDEX_FILE).read_text())
    (first / INDEX_FILE).write_text(json.dumps(index | {"version": FORMAT_VERSION + 1}))
    code, out, _ = data("ls")
    head, *rows, total = out.splitlines()
    assert code == 0
    assert head.split()[:4] == ["name", "tokens", "size", "created"]
    assert {row.split()[0] for row in rows} == {first.name[:12], second.name[:12]}
    assert all("docs.jsonl" in row for row in rows)
    assert total.startswith("2 caches, ")
    listed = json.loads(data("ls", "--json")[1])
    assert {cache["name"]: cache["state"] for cache in listed} == {
        first.name: "other format",
        second.name: "complete",
    }
    code, out, _ = data("prune", "--dry-run")
    assert (code, first.exists()) == (0, True)
    assert f"{first.name[:12]}" in out
    assert "would be removed: of another version of this program, docs.jsonl" in out
    code, out, _ = data("prune", "--json")
    assert code == 0
    assert [(r["name"], r["kept"]) for r in json.loads(out)["removals"]] == [(first.name, None)]
    assert caches(folder) == [second]
    assert "nothing to remove" in data("prune")[1]
    assert "nothing to remove" in data("prune", "--unused-days", "1")[1]
    assert data("prune", "--unused-days", "0", f"data.cache_dir={folder}/elsewhere")[0] == 0
    assert caches(folder) == [second]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "data: say what to do. Actions: prepare, show, verify, ls, prune"),
        (["prepair"], "there is no action 'prepair'. Did you mean prepare?"),
        (["data.path=x"], "there is no action 'data.path=x'"),
        (["prepare", "data.path=nowhere.txt"], "there is no such file or directory"),
        (["prepare", "train.stepz=3"], "no such key"),
        (["prepare", "-m", "seq_len=1,2"], "takes one config at a time"),
        (["prepare", "--all"], "unrecognized arguments: --all"),
        (["show", "nothing"], "there is no token cache of this name"),
        (["show", "a", "b"], "the name of one cache"),
        (["show", "a", "seq_len=8"], "the name of one cache"),
        (["show", "data=synthetic"], "there is no cache to look at"),
        (["show", "--documents", "-1"], "--documents"),
        (["show", "--documents", "x"], "must be an integer of at least 0"),
        (["verify", "--all", "x"], "leave out x"),
        (["ls", "x"], "takes data.cache_dir=DIR and flags here, not x"),
        (["prune", "--unused-days", "soon"], "must be a number of at least 0"),
        (["prune", "--unused-days", "nan"], "must be a number of at least 0"),
        (["prune", "--dryrun"], "not --dryrun"),
    ],
)
def test_mistakes(folder: Path, data: object, words: list[str], says: str) -> None:
    code, out, err = data(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert not (folder / "cache").exists()


def test_a_sample_needs_a_config(folder: Path, data: object) -> None:
    data("prepare", "data.path=docs.jsonl", BYTES)
    code, _, err = data("show", "--sample", caches(folder)[0].name)
    assert code == 2
    assert "needs the run's overrides" in err


def test_completion() -> None:
    assert candidates("megatrain data p") == ["prepare", "prune"]
    assert candidates("megatrain data show --do") == ["--documents"]
    assert candidates("megatrain data prepare data.tokenizer.kind=b") == [
        "data.tokenizer.kind=bpe",
        "data.tokenizer.kind=bytes",
    ]


def test_a_process_of_its_own(folder: Path) -> None:
    """Progress is on standard error, the JSON alone on standard output; `ls` imports no PyTorch."""
    call = [sys.executable, "-X", "importtime", "-m", "megatrain", "data"]
    made = subprocess.run(
        [*call[:1], "-m", "megatrain", "data", "prepare", "--json", "data.path=docs.jsonl", BYTES],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert json.loads(made.stdout)["contents"]["documents"] == 60
    listed = subprocess.run([*call, "ls"], capture_output=True, text=True, check=True, env=os.environ)
    assert "1 cache" in listed.stdout
    assert not any(line.endswith(" torch") for line in listed.stderr.splitlines())
