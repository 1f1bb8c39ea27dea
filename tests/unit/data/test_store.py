"""Token files: exact content, damage that is noticed, and one builder at a time."""

import fcntl
import hashlib
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatrain.config.errors import UserError
from megatrain.data.split_writer import SplitWriter
from megatrain.data.store import (
    SyntheticStore,
    TokenStore,
    UnfinishedError,
    build_once,
    cache_root,
    open_split,
    read_index,
    token_dtype,
    write_index,
)

EOS_ID = 9
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def write_data_set(directory: Path, *, vocab_size: int = 10, digest: str = "d") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with SplitWriter(directory, "train", vocab_size=vocab_size, eos_id=EOS_ID) as writer:
        for ids in DOCUMENTS:
            writer.append(np.array(ids[:1]), text_bytes=1, ends_document=False)  # in two pieces
            writer.append(np.array(ids[1:]), text_bytes=len(ids) - 1, ends_document=True)
    write_index(
        directory,
        splits={"train": writer.counts()},
        tokenizer_digest=digest,
        metadata={"vocab_size": vocab_size},
    )


def open_train(directory: Path) -> TokenStore:
    index = read_index(directory)
    assert index is not None
    store = open_split(directory, "train", index)
    assert store is not None
    return store


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(10, 2), (65536, 2), (65537, 4), (200_000, 4)])
def test_content(tmp_path: Path, vocab_size: int, bytes_each: int) -> None:
    write_data_set(tmp_path, vocab_size=vocab_size)
    store = open_train(tmp_path)
    assert store.tokens.tolist() == [1, 2, 3, 9, 4, 9, 5, 6, 7, 8, 9]
    assert store.document_starts.tolist() == [0, 4, 6]
    assert (store.n_tokens, store.text_bytes) == (11, 8)
    assert (tmp_path / "train.tokens").stat().st_size == 11 * bytes_each
    assert token_dtype(vocab_size).itemsize == bytes_each


def test_files_are_little_endian_on_every_machine(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    assert (tmp_path / "train.tokens").read_bytes()[:6] == b"\x01\0\x02\0\x03\0"
    assert (tmp_path / "train.documents").read_bytes()[8:16] == b"\x04" + b"\0" * 7


def test_read_gives_windows(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    rows = open_train(tmp_path).read(np.array([0, 7, 3]), 4)
    assert rows.tolist() == [[1, 2, 3, 9], [6, 7, 8, 9], [9, 4, 9, 5]]
    assert rows.dtype == np.uint16


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="produced token id 10, but its vocabulary size is 10"),
        SplitWriter(tmp_path, "train", vocab_size=10, eos_id=EOS_ID) as writer,
    ):
        writer.append(np.array([1, 10]), text_bytes=2, ends_document=True)


def test_fingerprint_covers_tokens_documents_and_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_data_set(tmp_path / name)
    write_data_set(tmp_path / "other_tokenizer", digest="e")
    write_data_set(tmp_path / "other_width", vocab_size=70_000)
    found = {p.name: read_index(p)["fingerprint"] for p in tmp_path.iterdir()}
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3
    assert open_train(tmp_path / "a").fingerprint == open_train(tmp_path / "other_tokenizer").fingerprint


# --- damage ---


@pytest.mark.parametrize("name", ["train.tokens", "train.documents"])
def test_a_cut_or_missing_file_is_damage(tmp_path: Path, name: str) -> None:
    write_data_set(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    assert read_index(tmp_path) is None
    (tmp_path / name).unlink()
    assert read_index(tmp_path) is None
    (tmp_path / name).write_bytes(content)
    assert read_index(tmp_path) is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 0, "files": {}}', "null"]
)
def test_a_bad_index_is_damage(tmp_path: Path, text: str) -> None:
    write_data_set(tmp_path)
    (tmp_path / "index.json").write_text(text)
    assert read_index(tmp_path) is None


# --- the cache directory ---


def never() -> None:
    raise AssertionError("waited without need")


def test_build_once_builds_once_and_repairs(tmp_path: Path) -> None:
    directory, builds = tmp_path / "cache" / "set", []

    def build(target: Path) -> None:
        builds.append(target.stat().st_ino)
        write_data_set(target)

    for expected in (1, 1):
        build_once(directory, build, waiting=never)
        assert len(builds) == expected
        assert directory.stat().st_ino == builds[-1]  # renamed as a whole, not copied file by file
    (directory / "train.tokens").write_bytes(b"")
    build_once(directory, build, waiting=never)
    assert len(builds) == 2
    assert open_train(directory).n_tokens == 11
    assert [p.name for p in directory.parent.iterdir() if p.name.startswith(".partial")] == []


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        write_data_set(target)
        raise UserError("too bad")

    with pytest.raises(UserError, match="too bad"):
        build_once(tmp_path / "set", build, waiting=never)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_what_a_killed_builder_left_is_there_for_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".partial-set").mkdir()
    (tmp_path / ".partial-set" / "train.tokens").write_text("half")
    (tmp_path / ".partial-other").mkdir()  # of another data set, perhaps being built
    left: list[str] = []

    def build(target: Path) -> None:
        left.extend(path.read_text() for path in target.iterdir())
        write_data_set(target)

    build_once(tmp_path / "set", build, waiting=never)
    assert left == ["half"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".partial-other", "set"]


def test_an_unfinished_build_is_kept(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        write_data_set(target)
        raise UnfinishedError("a process died")

    with pytest.raises(UserError, match="a process died"):
        build_once(tmp_path / "set", build, waiting=never)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [".partial-set"]


def test_the_second_builder_waits_and_takes_the_first_ones_work(tmp_path: Path) -> None:
    directory, waited = tmp_path / "set", threading.Event()
    with open(tmp_path / ".lock-set", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def build(target: Path) -> None:
            raise AssertionError("built twice")

        second = threading.Thread(target=build_once, args=(directory, build), kwargs={"waiting": waited.set})
        second.start()
        assert waited.wait(timeout=30)
        write_data_set(directory)
    second.join(timeout=30)
    assert not second.is_alive()
    assert open_train(directory).n_tokens == 11


def test_a_full_disk_is_the_users_matter(tmp_path: Path) -> None:
    """A file may not grow beyond 4 KiB in the child: the write fails as it does on a full disk."""
    code = f"""
import numpy as np, resource, pathlib
from megatrain.config.errors import UserError
from megatrain.data.split_writer import SplitWriter
from megatrain.data.store import build_once
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def build(target):
    with SplitWriter(target, "train", vocab_size=10, eos_id=9) as writer:
        writer.append(np.zeros(100_000, dtype=np.int64), text_bytes=1, ends_document=True)
try:
    build_once(pathlib.Path({str(tmp_path)!r}) / "set", build, waiting=print)
except UserError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot write the token cache" in output
    assert "File too large" in output
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write the token cache .* data.cache_dir or \$MEGATRAIN_CACHE"
    ):
        build_once(tmp_path / "file" / "set", write_data_set, waiting=never)


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("MEGATRAIN_CACHE", raising=False)
    assert cache_root(None) == Path("/home/u/.cache/megatrain")
    monkeypatch.setenv("MEGATRAIN_CACHE", "~/c")
    assert cache_root(None) == Path("/home/u/c")
    monkeypatch.chdir(tmp_path)
    assert cache_root("here") == tmp_path / "here"


# --- synthetic ---


def test_synthetic_tokens_depend_on_the_place_alone() -> None:
    store = SyntheticStore(1000)
    whole = store.read(np.array([0]), 5000)[0]
    assert np.array_equal(store.read(np.array([100, 4000]), 500), [whole[100:600], whole[4000:4500]])
    assert not np.array_equal(SyntheticStore(1000, seed=1).read(np.array([0]), 5000)[0], whole)
    far = store.read(np.array([store.n_tokens - 10]), 10)
    assert ((far >= 0) & (far < 1000)).all()


def test_synthetic_tokens_are_uniform() -> None:
    counts = np.bincount(SyntheticStore(64).read(np.array([12345]), 64_000)[0], minlength=64)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)  # mean and 5 sigma of chi-square with 63 degrees


def test_synthetic_fingerprints_differ() -> None:
    stores = [SyntheticStore(10), SyntheticStore(11), SyntheticStore(10, seed=1)]
    assert len({s.fingerprint for s in stores}) == 3
    assert all(len(s.fingerprint) == len(hashlib.sha256().hexdigest()) for s in stores)
