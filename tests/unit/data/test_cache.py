"""Caches as a user keeps them: the list, what may go and what must stay, with real builders and readers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatrain.config.errors import UserError
from megatrain.data import cache
from megatrain.data.cache import USED_FILE, find_cache, list_caches, mark_used, prune
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import prepare
from megatrain.data.store import INDEX_FILE, SOURCES_FILE, sealed

OLD = 1_600_000_000.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build(root: Path, file: Path, text: str = "Some text, twice the text.\n" * 20) -> Path:
    """Tokenize a text; return the directory of its cache, whose index says what it was made from."""
    file.write_text(text)
    cfg = DataConfig(path=str(file), cache_dir=str(root), tokenizer=TokenizerConfig(kind="bytes"))
    directory = prepare(cfg, progress=lambda name, share: None).directory
    assert directory is not None
    release(directory)
    return directory


def release(directory: Path) -> None:
    """Let go of a cache as the end of the process does, and forget that it was used."""
    os.close(cache._held.pop(str(directory)))
    (directory / USED_FILE).unlink()


def edit(directory: Path, **entries: object) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    (directory / INDEX_FILE).write_text(json.dumps(sealed(index | entries)))


def age(directory: Path, when: float = OLD) -> None:
    for file in (directory / INDEX_FILE, directory / USED_FILE):
        if file.exists():
            os.utime(file, (when, when))


@contextmanager
def another_process(statements: str) -> Iterator[None]:
    """Let another process run `statements` and wait until the block is left."""
    code = f"{statements}\nprint('ready', flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()
        process.kill()


READING = "from pathlib import Path; from megatrain.data.cache import mark_used; mark_used(Path({!r}))"
BUILDING = "import fcntl; held = open({!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX)"


def reasons(root: Path, **options: object) -> dict[str, tuple[str, str | None]]:
    return {r.cache.directory.name: (r.reason, r.failure) for r in prune(root, **options)}


# --- the list ---


def test_the_list(root: Path, tmp_path: Path) -> None:
    assert list_caches(root) == []
    first, second = build(root, tmp_path / "a.txt"), build(root, tmp_path / "b.txt", "Other text.\n" * 9)
    age(first)
    newest, oldest = list_caches(root)
    assert (newest.directory, oldest.directory) == (second, first)
    assert (newest.origin, newest.state, newest.sources) == (str(tmp_path / "b.txt"), "complete", "same")
    assert newest.tokens == sum(file.stat().st_size for file in second.glob("*.tokens")) / 2 > 100
    assert newest.bytes == sum(file.stat().st_size for file in second.rglob("*") if file.is_file())
    assert oldest.last_used == oldest.created == OLD
    assert not newest.in_use


def test_use_is_noted(root: Path, tmp_path: Path) -> None:
    directory = build(root, tmp_path / "a.txt")
    age(directory)
    with another_process(READING.format(str(directory))):
        (cache,) = list_caches(root)
        assert cache.in_use
        assert cache.last_used > OLD
        assert cache.created == OLD
    assert not list_caches(root)[0].in_use


def test_a_directory_that_must_not_be_written_to(root: Path, tmp_path: Path) -> None:
    directory = build(root, tmp_path / "a.txt")
    directory.chmod(0o500)
    try:
        with another_process(READING.format(str(directory))):
            assert list_caches(root)[0].in_use
    finally:
        directory.chmod(0o700)
    mark_used(tmp_path / "nowhere")


@pytest.mark.parametrize("when", ["before", "after"])
def test_sources(root: Path, tmp_path: Path, when: str) -> None:
    """Same, changed or missing; a file that was touched but has its content is the same."""
    file = tmp_path / "a.txt"
    directory = build(root, file)
    if when == "before":
        age(directory)  # the file seems to have been modified since, so it is hashed
    text = file.read_text()

    def sources() -> str:
        return list_caches(root)[0].sources

    assert sources() == "same"
    file.write_text(text + "more")
    assert sources() == "changed"
    age(directory)
    file.write_text(text.replace("twice", "thrce"))
    assert sources() == "changed"
    file.write_text(text)
    assert sources() == "same"
    file.unlink()
    assert sources() == "missing"
    (directory / SOURCES_FILE).unlink()
    assert sources() == "unknown"


def test_sources_in_a_directory_and_of_a_pattern(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "deep" / "a.txt").write_text("a text")
    (tmp_path / "corpus" / "b.txt").write_text("b text")
    monkeypatch.chdir(tmp_path)
    for path in ("corpus", "corpus/**/*.txt"):
        cfg = DataConfig(path=path, cache_dir=str(root), tokenizer=TokenizerConfig(kind="bytes"))
        prepare(cfg, progress=lambda name, share: None)
    monkeypatch.chdir("/")
    assert {cache.sources for cache in list_caches(root)} == {"same"}
    (tmp_path / "corpus" / "b.txt").unlink()
    assert {cache.sources for cache in list_caches(root)} == {"changed"}


def test_names(root: Path, tmp_path: Path) -> None:
    directory = build(root, tmp_path / "a.txt")
    assert find_cache(root, directory.name[:6]) == directory
    assert find_cache(root, str(directory)) == directory
    with pytest.raises(UserError, match="there is no token cache of this name"):
        find_cache(root, "nothing")
    directory.with_name(directory.name[:31] + ("0" if directory.name[31] != "0" else "1")).mkdir()
    with pytest.raises(UserError, match="2 caches have names that begin so"):
        find_cache(root, directory.name[:6])


# --- pruning ---


def test_what_may_go(root: Path, tmp_path: Path) -> None:
    caches = {
        n: build(root, tmp_path / n, f"Text {n} text.\n" * 30) for n in ("kept", "old", "gone", "cut", "new")
    }
    edit(caches["old"], version=0)
    (tmp_path / "gone").write_text("different")
    (caches["cut"] / "train.tokens").write_bytes(b"")
    (root / f".partial-{'0' * 32}-77").mkdir()
    (root / f".partial-{'0' * 32}-77" / "train.tokens").write_bytes(b"1234")
    for name in ("2" * 32, "3" * 32):  # the next preparation goes on with the fresh one
        (root / f".partial-{name}" / "work" / "read-000000").mkdir(parents=True)
    os.utime(root / f".partial-{'3' * 32}" / "work", (OLD, OLD))
    (root / "somebody's folder").mkdir()
    (root / "shortcuts").mkdir(exist_ok=True)
    for name, directory in caches.items():
        (root / "shortcuts" / name).write_text(directory.name)
    expected = {
        caches["old"].name: ("of another version of this program", None),
        caches["gone"].name: ("its source files have changed", None),
        caches["cut"].name: ("damaged", None),
        f".partial-{'0' * 32}-77": ("its builder was ended", None),
        f".partial-{'3' * 32}": ("its builder was ended", None),
    }
    before = sorted(root.rglob("*"))
    assert reasons(root, dry_run=True) == expected
    assert [p for p in sorted(root.rglob("*")) if not p.name.startswith(".lock")] == [
        p for p in before if not p.name.startswith(".lock")
    ]
    assert reasons(root) == expected
    left = {p.name for p in root.iterdir() if not p.name.startswith(".lock")}
    unfinished = f".partial-{'2' * 32}"
    assert left == {caches["kept"].name, caches["new"].name, unfinished, "shortcuts", "somebody's folder"}
    assert {p.read_text() for p in (root / "shortcuts").iterdir()} == {
        caches["kept"].name,
        caches["new"].name,
    }
    assert reasons(root) == {}


def test_unused_for_days(root: Path, tmp_path: Path) -> None:
    old, new = build(root, tmp_path / "a"), build(root, tmp_path / "b", "Text.\n" * 50)
    age(old)
    edit(old, created="2020-01-01T00:00:00+00:00")
    age(old)
    assert reasons(root) == {}
    ((name, (reason, failure)),) = reasons(root, unused_days=30).items()
    assert (name, failure) == (old.name, None)
    assert reason.startswith("not used for ")
    assert not old.exists()
    assert new.exists()


def test_what_is_read_or_built_stays(root: Path, tmp_path: Path) -> None:
    directory = build(root, tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("changed")
    partial = root / f".partial-{'1' * 32}-5"
    partial.mkdir()
    lock = str(root / f".lock-{'1' * 32}")
    with another_process(READING.format(str(directory))), another_process(BUILDING.format(lock)):
        assert reasons(root) == {directory.name: ("its source files have changed", "in use")}
        assert directory.exists()
        assert partial.exists()
    assert len(reasons(root)) == 2
    assert not directory.exists()
    assert not partial.exists()
