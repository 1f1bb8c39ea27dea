"""The check of a cache: each kind of damage is found and named, by file and place."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from megatrain.data import verify as module
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import prepare
from megatrain.data.store import INDEX_FILE, _fingerprint, read_index, sealed
from megatrain.data.verify import verify


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    rows = "".join(f'{{"text": "document {i} with some text"}}\n' for i in range(40))
    (tmp_path / "a.jsonl").write_text(rows)
    cfg = DataConfig(
        path=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(kind="bytes"),
        val_fraction=0.2,
    )
    directory = prepare(cfg, progress=lambda name, share: None).directory
    assert directory is not None
    return directory


def check(directory: Path) -> list[tuple[str, int | None, str]]:
    return [(d.file, d.offset, d.what) for d in verify(directory, progress=lambda share: None)]


def rewrite(directory: Path, name: str, content: bytes) -> None:
    """Change a file and its entry in the index, as a builder with a fault would write them."""
    (directory / name).write_bytes(content)
    index = json.loads((directory / INDEX_FILE).read_text())
    index["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    index["fingerprint"] = _fingerprint(index["tokenizer_digest"], index["splits"], index["files"])
    (directory / INDEX_FILE).write_text(json.dumps(sealed(index)))


def test_a_whole_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    assert verify(cache, progress=seen.append) == []
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1] == 1.0


def test_a_changed_byte_of_any_file(cache: Path) -> None:
    names = list(json.loads((cache / INDEX_FILE).read_text())["files"])
    assert len(names) >= 5
    for name in names:
        content = (cache / name).read_bytes()
        middle = len(content) // 2
        (cache / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        files = [file for file, _, what in check(cache) if "SHA-256" in what]
        assert files == [name]
        (cache / name).write_bytes(content[:-1])
        assert name in [file for file, _, what in check(cache) if "and should have" in what]
        (cache / name).unlink()
        assert (name, None, "can't be read: No such file or directory") in check(cache)
        (cache / name).write_bytes(content)
    assert check(cache) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("fingerprint", "0" * 64, "has a fingerprint that is not that of the files which it lists"),
        ("tokenizer_digest", "0" * 64, "has a fingerprint that is not that"),
        ("vocab_size", 258, "was edited after it was written"),
        ("sha256", "0" * 64, "was edited after it was written"),
    ],
)
def test_an_edited_index(cache: Path, key: str, value: object, says: str) -> None:
    index = json.loads((cache / INDEX_FILE).read_text())
    assert read_index(cache) is not None
    (cache / INDEX_FILE).write_text(json.dumps(index | {key: value}))
    assert read_index(cache) is None
    ((file, _, what),) = check(cache)
    assert file == INDEX_FILE
    assert says in what


def test_an_index_of_an_earlier_version_has_no_hash(cache: Path) -> None:
    index = json.loads((cache / INDEX_FILE).read_text())
    (cache / INDEX_FILE).write_text(json.dumps({k: v for k, v in index.items() if k != "sha256"}))
    assert read_index(cache) is not None
    assert check(cache) == []


def test_tokens_outside_the_vocabulary(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    tokens = np.fromfile(cache / "train.tokens", dtype="<u2")
    tokens[100], tokens[300] = 999, 257
    rewrite(cache, "train.tokens", tokens.tobytes())
    assert check(cache) == [("train.tokens", 200, "has token id 999, and the vocabulary has 257 tokens")]


def test_documents_that_cannot_be(cache: Path) -> None:
    starts = np.fromfile(cache / "train.documents", dtype="<i8")
    n_tokens = (cache / "train.tokens").stat().st_size // 2
    for place, value, offset, says in (
        (0, 3, 0, "begins with 3"),
        (5, starts[4], 40, "document 5 does not start after the one before it"),
        (len(starts) - 1, n_tokens, 8 * (len(starts) - 1), "starts after the last token"),
    ):
        wrong = starts.copy()
        wrong[place] = value
        rewrite(cache, "train.documents", wrong.tobytes())
        ((file, found, what),) = check(cache)
        assert (file, found) == ("train.documents", offset)
        assert says in what
    wrong = starts.copy()
    wrong[7] += 1
    rewrite(cache, "train.documents", wrong.tobytes())
    ((file, found, what),) = check(cache)
    assert (file, found) == ("train.tokens", 2 * starts[7])
    assert "document 6 does not end with the end-of-text token (256)" in what
    rewrite(cache, "train.documents", starts[:-1].tobytes())
    assert "the index counts" in check(cache)[0][2]


def test_the_last_document_must_end(cache: Path) -> None:
    tokens = np.fromfile(cache / "train.tokens", dtype="<u2")
    tokens[-1] = 65
    rewrite(cache, "train.tokens", tokens.tobytes())
    ((file, found, _),) = check(cache)
    assert (file, found) == ("train.tokens", 2 * (len(tokens) - 1))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "can't be read"),
        ("[]", "can't be read"),
        ('{"version": 0}', "has format 0"),
        ('{"version": 1}', "is not what this program writes"),
        (
            '{"version": 1, "splits": {"train": {}}, "files": {}, "vocab_size": "x"}',
            "is not what this program writes",
        ),
    ],
)
def test_an_index_that_is_none(cache: Path, content: str, says: str) -> None:
    (cache / INDEX_FILE).write_text(content)
    file, _, what = check(cache)[0]
    assert file == INDEX_FILE
    assert says in what
