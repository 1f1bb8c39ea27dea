"""From real files to tokens: content, the cache, killed and concurrent preparations, wrong inputs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.config.errors import UserError
from megatrain.data import build
from megatrain.data.build import held_out
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import Prepared, prepare
from megatrain.data.sources.corpus import find_corpus
from megatrain.data.store import SyntheticStore, TokenStore
from megatrain.data.tokenizer import ByteTokenizer, train_bpe

BYTES = TokenizerConfig(kind="bytes")


class Phases:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, phase: str, fraction: float) -> None:
        self.seen.setdefault(phase, []).append(fraction)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.5 MB of real Python source."""
    directory = tmp_path_factory.mktemp("library")
    for document in find_corpus(None).documents():
        if document.id.split("/")[0] in ("email", "json", "html"):
            (directory / document.id).parent.mkdir(parents=True, exist_ok=True)
            (directory / document.id).write_text(document.text, encoding="utf-8")
    time.sleep(0.1)  # until the file system's clock has moved on, so that shortcuts may be trusted
    return directory


def run(path: Path | str | None, cache: Path, progress: Phases | None = None, **fields: object) -> Prepared:
    fields = {"tokenizer": BYTES, **fields}
    cfg = DataConfig(path=None if path is None else str(path), cache_dir=str(cache), **fields)
    return prepare(cfg, progress=progress or Phases())


def refusal(path: Path | str, cache: Path, **fields: object) -> str:
    with pytest.raises(UserError) as caught:
        run(path, cache, **fields)
    assert not cache.exists() or data_sets(cache) == []
    return str(caught.value)


def data_sets(cache: Path) -> list[Path]:
    """All directories in the cache but that of the shortcuts, finished or not."""
    return sorted(p for p in cache.iterdir() if p.is_dir() and p.name != "shortcuts")


def documents_of(store: TokenStore, eos_id: int) -> list[list[int]]:
    """The documents of a split, without their ends."""
    documents = [d.tolist() for d in np.split(store.tokens, store.document_starts[1:])]
    assert all(d[-1] == eos_id and eos_id not in d[:-1] for d in documents)
    return [d[:-1] for d in documents]


def decode_all(prepared: Prepared, store: TokenStore) -> list[str]:
    return [prepared.tokenizer.decode(d) for d in documents_of(store, prepared.tokenizer.eos_id)]


# --- content ---


def test_tokens_are_the_text(library: Path, cache: Path) -> None:
    made = run(library, cache, tokenizer=TokenizerConfig(vocab_size=600), val_fraction=0.1)
    texts = [d.text for d in find_corpus(str(library)).documents()]
    assert decode_all(made, made.train) == [t for t in texts if not held_out(t, 0.1)]
    assert decode_all(made, made.val) == [t for t in texts if held_out(t, 0.1)]
    for store in (made.train, made.val):
        assert made.token_bytes[store.tokens].sum() == store.text_bytes
    assert made.train.text_bytes + made.val.text_bytes == sum(len(t.encode()) for t in texts)


def test_the_held_out_share_is_about_what_was_asked() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    share = sum(held_out(t, 0.1) for t in texts) / len(texts)
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / len(texts)) ** 0.5  # 5 sigma of a binomial
    assert not any(held_out(t, 0.0) for t in texts)
    assert all(held_out(t, 0.5) for t in texts if held_out(t, 0.1))  # a larger share only adds


def test_the_tokenizer_does_not_see_the_held_out_text(library: Path, cache: Path) -> None:
    made = run(library, cache, tokenizer=TokenizerConfig(vocab_size=600), val_fraction=0.1)
    train = [d.text for d in find_corpus(str(library)).documents() if not held_out(d.text, 0.1)]
    assert made.tokenizer.digest() == train_bpe(iter(train), vocab_size=600).digest()


def test_order_and_names_of_files_do_not_move_documents(tmp_path: Path, cache: Path) -> None:
    texts = [f"text number {i}\n" for i in range(300)]
    for folder, numbers in (("a", range(300)), ("b", reversed(range(300)))):
        (tmp_path / folder).mkdir()
        for name, i in enumerate(numbers):
            (tmp_path / folder / f"{name:03}.txt").write_text(texts[i])
    a, b = (run(tmp_path / folder, cache, val_fraction=0.1) for folder in ("a", "b"))
    assert sorted(decode_all(a, a.val)) == sorted(decode_all(b, b.val))
    assert a.fingerprint != b.fingerprint


def test_one_document_has_its_tail_held_out(tmp_path: Path, cache: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "my.txt").write_text(text)
    made = run(tmp_path / "my.txt", cache, val_fraction=0.1)
    (train,), (val,) = decode_all(made, made.train), decode_all(made, made.val)
    assert train + val == text
    assert train.endswith("\n")
    assert 0.08 < len(val) / len(text) <= 0.1


def test_a_tail_without_line_breaks_is_cut_anywhere(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "my.txt").write_text("x" * 999 + "\n")
    made = run(tmp_path / "my.txt", cache, val_fraction=0.1)
    assert decode_all(made, made.val) == ["x" * 99 + "\n"]


def test_few_documents_hold_out_the_tail_of_the_longest(tmp_path: Path, cache: Path) -> None:
    rows = ["short", "y\n" * 500, "also short"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows))
    made = run(tmp_path / "a.jsonl", cache, val_fraction=0.01)
    assert decode_all(made, made.val) == ["y\n" * 5]
    assert decode_all(made, made.train) == ["short", "y\n" * 495, "also short"]


def test_no_validation_on_request_or_for_want_of_text(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 3)
    assert run(tmp_path / "a.txt", cache, val_fraction=0.0).val is None
    assert run(tmp_path / "a.txt", cache, val_fraction=0.01).val is None


def test_jsonl_and_parquet_give_the_same_data(tmp_path: Path, cache: Path) -> None:
    texts = [f"Übung {i}\n" * 3 for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    made = [run(tmp_path / name, cache, text_field="body") for name in ("a.jsonl", "a.parquet")]
    assert made[0].fingerprint == made[1].fingerprint


def test_a_document_longer_than_a_piece(tmp_path: Path, cache: Path) -> None:
    text = "ü" * ((1 << 20) + 17) + "end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    made = run(tmp_path / "a.txt", cache, val_fraction=0.0)
    assert decode_all(made, made.train) == [text]
    assert made.train.text_bytes == len(text.encode())


def test_large_text_trains_the_tokenizer_on_a_share(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.data.build.TRAIN_CHARS", 10_000)
    taken: list[str] = []

    def record(texts: Iterator[str], *, vocab_size: int) -> object:
        taken.extend(texts)
        return train_bpe(iter(taken), vocab_size=vocab_size)

    monkeypatch.setattr("megatrain.data.build.train_bpe", record)
    texts = [f"{i:04} " * 20 for i in range(1000)]  # 100,000 characters
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    made = run(tmp_path / "a.jsonl", cache, tokenizer=TokenizerConfig(vocab_size=300), val_fraction=0.0)
    assert decode_all(made, made.train) == texts
    assert 9_000 < sum(map(len, taken)) < 11_000
    assert np.diff([texts.index(t) for t in taken]).max() <= 12  # one of ten, all along


def test_the_default_is_the_standard_library(cache: Path) -> None:
    made = run(None, cache)
    texts = {d.text for d in find_corpus(None).documents()}
    assert made.train.text_bytes + made.val.text_bytes == sum(len(t.encode()) for t in texts)
    assert len(made.train.document_starts) + len(made.val.document_starts) == len(texts)
    progress, seconds = Phases(), []
    for _ in range(3):
        start = time.process_time()
        assert run(None, cache, progress).fingerprint == made.fingerprint
        seconds.append(time.process_time() - start)
    assert progress.seen == {}
    assert min(seconds) < 0.3  # CPU time: 0.05 s; reading all files again takes 0.4 s or more


def test_synthetic_data_reads_and_writes_nothing(cache: Path) -> None:
    cfg = DataConfig(kind="synthetic", cache_dir=str(cache))
    made = prepare(cfg, progress=Phases(), vocab_size=77)
    assert made.train == SyntheticStore(77)
    assert made.val != made.train
    assert made.token_bytes.shape == (77,)
    assert not cache.exists()


# --- the cache ---


def test_progress_tells_each_phase_from_start_to_end(library: Path, cache: Path) -> None:
    progress = Phases()
    run(library, cache, progress, tokenizer=TokenizerConfig(vocab_size=600))
    assert list(progress.seen) == ["reading", "training the tokenizer", "tokenizing"]
    for fractions in progress.seen.values():
        assert all(0 <= f <= 1 for f in fractions)
        assert fractions[-1] == 1


def test_what_decides_the_tokens_decides_the_entry(library: Path, cache: Path) -> None:
    first = run(library, cache)
    for fields in ({"mask_documents": False}, {"prefetch": 7}):
        progress = Phases()
        assert run(library, cache, progress, **fields).fingerprint == first.fingerprint
        assert progress.seen == {}
    assert len(data_sets(cache)) == 1
    run(library, cache, val_fraction=0.2)
    run(library, cache, tokenizer=TokenizerConfig(vocab_size=300))
    run(library, cache, tokenizer=TokenizerConfig(vocab_size=301))
    assert len(data_sets(cache)) == 4


def test_a_copy_elsewhere_is_recognised_by_its_content(library: Path, cache: Path, tmp_path: Path) -> None:
    first = run(library, cache)
    subprocess.run(["cp", "-r", library, tmp_path / "copy"], check=True)
    progress = Phases()
    assert run(tmp_path / "copy", cache, progress).fingerprint == first.fingerprint
    assert "tokenizing" not in progress.seen


def test_changed_text_is_noticed(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one text\n" * 10)
    times = os.stat(file)
    first = run(file, cache)
    file.write_text("two text\n" * 10)  # at once, of the same size, with the same time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = run(file, cache)
    assert decode_all(second, second.train)[0].startswith("two")
    assert first.fingerprint != second.fingerprint


def test_the_times_of_a_fresh_file_are_not_trusted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    hour_ns, fresh, old = 3600 * 10**9, ["reading"], []
    for tick_ns, expected in ((hour_ns, [*fresh, "tokenizing"]), (hour_ns, fresh), (0, fresh), (0, old)):
        monkeypatch.setattr("megatrain.data.sources.corpus.CLOCK_TICK_NS", tick_ns)
        progress = Phases()
        run(tmp_path / "a.txt", cache, progress)
        assert list(progress.seen) == expected


def test_a_changed_tokenizer_is_noticed(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    prints = []
    for text in ("some some some", "text text text"):
        train_bpe(iter([text]), vocab_size=260).save(tmp_path / "tok")
        cfg = TokenizerConfig(kind="huggingface", path=str(tmp_path / "tok"))
        prints.append(run(tmp_path / "a.txt", cache, tokenizer=cfg).fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("name", ["train.tokens", "val.documents", "tokenizer/meta.json", "index.json"])
def test_a_damaged_entry_is_built_anew(library: Path, cache: Path, name: str) -> None:
    first = run(library, cache)
    (entry,) = data_sets(cache)
    content = (entry / name).read_bytes()
    (entry / name).write_bytes(content[:-3])
    progress = Phases()
    assert run(library, cache, progress).fingerprint == first.fingerprint
    assert "tokenizing" in progress.seen
    assert (entry / name).read_bytes() == content
    assert data_sets(cache) == [entry]


def test_a_cache_that_cannot_be_written_still_serves(library: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        first = run(library, cache)
        cache.chmod(0o555)
        assert run(library, cache).fingerprint == first.fingerprint
        cache.chmod(0o755)


# --- other processes ---

CHILD = """
import os, signal, sys, time
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import prepare
path, cache, stop_phase, stop_call, gate = sys.argv[1:]
calls = 0
def progress(phase, fraction):
    global calls
    print(phase, flush=True)
    if phase == stop_phase:
        calls += 1
        if calls == int(stop_call):
            if not gate:
                os.kill(os.getpid(), signal.SIGKILL)
            while not os.path.exists(gate):
                time.sleep(0.01)
cfg = DataConfig(path=path, cache_dir=cache, tokenizer=TokenizerConfig(vocab_size=600))
print("fingerprint", prepare(cfg, progress=progress).fingerprint)
"""


def child(library: Path, cache: Path, phase: str, call: int = 1, gate: str = "") -> subprocess.Popen[str]:
    """Prepare in a process that, at a call of its progress, kills itself or waits for the file `gate`."""
    arguments = [str(library), str(cache), phase, str(call), gate]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that a preparation makes which nobody kills."""
    cache = tmp_path_factory.mktemp("undisturbed")
    run(library, cache, tokenizer=TokenizerConfig(vocab_size=600))
    return data_sets(cache)[0]


@pytest.mark.parametrize(
    ("phase", "call"),
    [("reading", 1), ("training the tokenizer", 10), ("tokenizing", 1), ("tokenizing", 2)],
)
def test_a_killed_preparation_leaves_nothing_that_is_read(
    library: Path, undisturbed: Path, tmp_path: Path, phase: str, call: int
) -> None:
    cache = tmp_path / "cache"
    process = child(library, cache, phase, call)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not cache.exists() or all(p.name.startswith(".partial") for p in data_sets(cache))

    run(library, cache, tokenizer=TokenizerConfig(vocab_size=600))
    (after_kill,) = data_sets(cache)
    assert after_kill.name == undisturbed.name
    assert bytes_of(after_kill) == bytes_of(undisturbed)


def test_a_killed_preparation_goes_on_with_the_next_unit(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small units: killed in the second pass, the first one is not done again."""
    small_units = "import megatrain.data.sources.parts as parts\nparts.UNIT_BYTES = 20_000\n"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            small_units + CHILD,
            str(library),
            str(tmp_path / "cache"),
            "tokenizing",
            "9",
            "",
        ],
        stdout=subprocess.PIPE,
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (partial,) = data_sets(tmp_path / "cache")
    encoded = len(list(partial.glob("work/tokens-[0-9]*[0-9]")))
    assert encoded >= 2

    monkeypatch.setattr("megatrain.data.sources.parts.UNIT_BYTES", 20_000)
    calls = {"read_unit": 0, "encode_unit": 0}
    for name in calls:
        real = getattr(build, name)

        def counting(*arguments: object, name: str = name, real: Callable[..., None] = real) -> None:
            calls[name] += 1
            real(*arguments)

        monkeypatch.setattr(build, name, counting)
    run(library, tmp_path / "cache", tokenizer=TokenizerConfig(vocab_size=600))
    run(library, tmp_path / "whole", tokenizer=TokenizerConfig(vocab_size=600))
    units = calls["read_unit"]
    assert units > 10
    assert calls["encode_unit"] == 2 * units - encoded
    (resumed,), (whole,) = data_sets(tmp_path / "cache"), data_sets(tmp_path / "whole")
    assert bytes_of(resumed) == bytes_of(whole)


def test_the_number_of_processes_changes_nothing(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.data.sources.parts.UNIT_BYTES", 100_000)
    for workers in (1, 2):
        run(library, tmp_path / str(workers), tokenizer=TokenizerConfig(vocab_size=600), workers=workers)
    (one,), (two,) = data_sets(tmp_path / "1"), data_sets(tmp_path / "2")
    assert bytes_of(one) == bytes_of(two)


def test_a_process_that_dies_leaves_its_work_to_the_next_attempt(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.data.sources.parts.UNIT_BYTES", 20_000)
    monkeypatch.setattr(build, "encode_unit", die)
    with pytest.raises(UserError, match="died, as happens when memory runs out; the same command goes on"):
        run(library, tmp_path, workers=2)
    (partial,) = data_sets(tmp_path)
    assert len(list(partial.glob("work/read-[0-9]*[0-9]"))) > 10


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_of_two_preparations_one_works_and_one_waits(
    library: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache, gate = tmp_path / "cache", tmp_path / "go"
    first = child(library, cache, "tokenizing", gate=str(gate))
    assert first.stdout is not None
    while first.stdout.readline() != "tokenizing\n":
        assert first.poll() is None
    second = child(library, cache, "never")
    assert second.stdout is not None
    lines = []
    while not any(line.startswith("waiting") for line in lines):
        lines.append(second.stdout.readline())
        assert second.poll() is None
    gate.touch()
    outputs = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert [p.returncode for p in (first, second)] == [0, 0]
    expected = json.loads((undisturbed / "index.json").read_text())["fingerprint"]
    assert all(output.splitlines()[-1] == f"fingerprint {expected}" for output in outputs)
    assert "tokenizing" not in outputs[1]
    assert len(data_sets(cache)) == 1


# --- wrong inputs: each is one message, and the cache stays without half a data set ---


def test_one_token_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for tokenizer in (BYTES, TokenizerConfig(vocab_size=300)):
        assert "too little text: 1 training tokens" in refusal(tmp_path / "a.txt", cache, tokenizer=tokenizer)


def test_empty_missing_and_not_utf8(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"abc \xe9")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "image.bin").write_bytes(b"\0\1\2")
    assert "the file is empty" in refusal(tmp_path / "empty.txt", cache)
    assert "no such file" in refusal(tmp_path / "none.txt", cache)
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 4" in refusal(tmp_path / "latin.txt", cache)
    assert "contains no text (left out: 1 file (not text, .bin): image.bin)" in refusal(
        tmp_path / "dir", cache
    )


def test_only_empty_texts(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    assert "contains no text (left out: 3 rows (empty): a.jsonl:1, a.jsonl:2, a.jsonl:3)" in refusal(
        tmp_path / "a.jsonl", cache
    )


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    cfg = DataConfig(path=str(tmp_path / "a.txt"), cache_dir=str(cache), tokenizer=BYTES)
    assert prepare(cfg, progress=Phases(), vocab_size=257).tokenizer.vocab_size == 257
    with pytest.raises(UserError, match=r"model.vocab_size=256: must be at least the tokenizer's 257 tokens"):
        prepare(cfg, progress=Phases(), vocab_size=256)


def test_a_tokenizer_that_breaks_its_own_vocabulary(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    assert "produced token id 120, but its vocabulary size is 100" in refusal(tmp_path / "a.txt", cache)


def test_text_that_changes_while_it_is_read(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text\n" * 10)

    def progress(phase: str, fraction: float) -> None:
        if phase == "tokenizing":
            file.write_text("other text\n" * 10)

    cfg = DataConfig(path=str(file), cache_dir=str(cache), tokenizer=BYTES)
    with pytest.raises(UserError, match="was modified while it was being read"):
        prepare(cfg, progress=progress)
    assert data_sets(cache) == []


def test_a_cache_in_a_bad_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the token cache"):
        run(tmp_path / "a.txt", tmp_path / "file" / "cache")


def test_what_was_read_is_counted_also_from_the_cache_under_another_name(tmp_path: Path, cache: Path) -> None:
    texts = {"a.txt": "one text", "b.txt": "another, longer text", "empty.txt": "", "image.bin": "\0\1"}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_text(text)
        contents = run(tmp_path / name, cache, val_fraction=0.0).contents
        assert contents is not None
        assert (contents.origin, contents.files, contents.documents) == (str(tmp_path / name), 2, 2)
        assert (contents.train_tokens, contents.val_tokens, contents.text_bytes) == (
            30,
            0,
            28,
        )  # two ends of text
        assert {(g.reason, g.count) for g in contents.left_out} == {("empty", 1), ("not text, .bin", 1)}
    assert len(data_sets(cache)) == 1
    assert prepare(DataConfig(kind="synthetic"), progress=Phases(), vocab_size=8).contents is None
