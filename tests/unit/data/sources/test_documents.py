"""Documents from every kind of source, and one clear message for every wrong one."""

import json
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.config.errors import UserError
from megatrain.data.sources.corpus import Corpus, find_corpus
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.parts import scan
from megatrain.data.sources.readers import Document

NOBODY = 65534


def read(path: Path | str, field: str = "text") -> list[Document]:
    return list(find_corpus(str(path), text_field=field).documents())


def counts(left_out: LeftOut) -> dict[str, int]:
    """How many were left out, by reason."""
    return {group.reason: group.count for group in left_out}


def refusal(path: Path | str, field: str = "text") -> str:
    """The message with which `path` is refused."""
    with pytest.raises(UserError) as caught:
        read(path, field)
    message = str(caught.value)
    assert "\n" not in message
    return message


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as an ordinary user, since permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that ordinary users can enter, too."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# --- sources ---


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "no_suffix"])
def test_a_text_file_is_one_document_as_it_is(tmp_path: Path, name: str) -> None:
    text = "Zeile 1  \r\nÜber 日本 🙂\n\n"
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == [Document(name, text)]


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "a.txt") == [Document("a.txt", "abc")]


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "n": 1}, {"text": ""}, {"text": "ü"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows) + "\n")
    assert read(tmp_path / "a.jsonl") == [Document("a.jsonl:1", "one\ntwo"), Document("a.jsonl:5", "ü")]


def test_jsonl_with_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}')
    assert read(tmp_path / "a.jsonl", "content") == [Document("a.jsonl:1", "x")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i % 7}" for i in range(3000)]
    texts[5] = None
    table = pa.table({"id": list(range(3000)), "body": pa.array(texts, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    expected = [Document(f"a.parquet:{i}", text) for i, text in enumerate(texts, 1) if text]
    assert read(tmp_path / "a.parquet", "body") == expected


def test_directory_is_read_recursively_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.md", "c.jsonl", ".hidden/x.txt", "a/.x.txt", "__pycache__/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "nothing.txt").touch()
    skipped = LeftOut()
    documents = list(find_corpus(str(tmp_path)).documents(skipped))
    assert [d.id for d in documents] == ["a/b.md", "a/z.txt", "b.txt", "c.jsonl:1"]
    assert [d.text for d in documents] == ["a/b.md", "a/z.txt", "b.txt", "c.jsonl"]
    assert counts(skipped) == {"not text, .png": 1, "empty": 1}


def test_glob_takes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a/c.txt", "a/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.id for d in read("*.txt")] == ["b.txt"]
    assert [d.id for d in read("**/*.txt")] == ["a/c.txt", "b.txt"]
    assert sorted(d.text for d in read(f"{tmp_path}/**")) == ["a/c.txt", "a/d.md", "b.txt"]


def test_a_name_with_pattern_signs_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert read(tmp_path / "a[1].txt") == [Document("a[1].txt", "x")]


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "a.py": b"x = 1  \r\n\n\n",
        "b.py": b"x = 1\n",  # the same when clean
        "c.py": "# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"),
        "d.py": b"# -*- coding: no-such-encoding -*-\n",
        "e.py": b"s = '\xff'\n",
        "f.txt": b"no source",
        "g.py": b"\n \n",
        "site-packages/h.py": b"y = 2\n",
        "lib2to3/tests/data/i.py": b"print 1\n",
        "lib2to3/j.py": b"z = 3\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    skipped = LeftOut()
    documents = list(find_corpus(None).documents(skipped))
    assert documents == [
        Document("a.py", "x = 1\n"),
        Document("b.py", "x = 1\n"),  # a duplicate, which the preparation takes out
        Document("c.py", "# -*- coding: latin-1 -*-\ns = 'é'\n"),
        Document("lib2to3/j.py", "z = 3\n"),
    ]
    assert counts(skipped) == {"undecodable": 2, "empty": 1}


def test_the_real_standard_library() -> None:
    skipped = LeftOut()
    documents = list(find_corpus(None).documents(skipped))
    texts = {d.id: d.text for d in documents}
    assert "class Counter" in texts["collections/__init__.py"]
    assert len(documents) > 500
    assert 0 <= len(documents) - len(set(texts.values())) < 50
    assert not any(line != line.rstrip() for text in texts.values() for line in text.split("\n"))
    assert counts(skipped)["undecodable"] < 20


# --- identity ---


def digest(corpus: Corpus) -> str:
    return corpus.content_digest([scan(corpus, number).digest for number in range(len(corpus.files))])


def test_stamp_and_content_digest(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("abc")
        (tmp_path / folder / "b.txt").write_text("def")
    one, two = find_corpus(str(tmp_path / "one")), find_corpus(str(tmp_path / "two"))
    assert one.stamp() == find_corpus(str(tmp_path / "one")).stamp() != two.stamp()
    assert digest(one) == digest(two)
    before = os.stat(tmp_path / "two/a.txt")
    time.sleep(0.1)
    assert two.is_settled()
    (tmp_path / "two/a.txt").write_text("abd")  # the same size ...
    os.utime(tmp_path / "two/a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))  # ... and time
    changed = find_corpus(str(tmp_path / "two"))
    assert digest(changed) != digest(one)
    assert changed.stamp() != two.stamp()


# --- wrong inputs ---


def test_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.txt")
    assert "no such file or directory" in message
    assert "no.txt" in message


def test_pattern_without_match(tmp_path: Path) -> None:
    assert "no file matches" in refusal(tmp_path / "*.txt")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "the file is empty" in refusal(tmp_path / "a.txt")


def test_directory_without_text(tmp_path: Path) -> None:
    assert "it contains no text" in refusal(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert "it contains no text" in refusal(tmp_path)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\0def")
    assert "not text" in refusal(tmp_path / "a.txt")


def test_a_device_is_no_file() -> None:
    assert "neither a file nor a directory" in refusal("/dev/null")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode() + "grün".encode("latin-1"))
    message = refusal(tmp_path / "a.txt")
    assert f"{tmp_path}/a.txt is not UTF-8: byte 0xfc at offset 7" in message
    (tmp_path / "b.txt").write_text("grün")
    skipped = LeftOut()
    assert list(find_corpus(str(tmp_path)).documents(skipped)) == [Document("b.txt", "grün")]
    assert counts(skipped) == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{'text': 1}", "a.jsonl:2 is not JSON"),
        (b'{"text": "a"', "a.jsonl:2 is not JSON"),
        (b"[" * 100_000, "a.jsonl:2 is not JSON"),
        (b'["a"]', "a.jsonl:2 is not a JSON object"),
        (b'{"body": "a", "id": 1}', "a.jsonl:2 has no field 'text' (its fields: 'body', 'id')"),
        (b"{}", "a.jsonl:2 has no field 'text' (its fields: none)"),
        (b'{"text": 5}', "a.jsonl:2: field 'text' holds int, not text"),
        (b'{"text": [1]}', "a.jsonl:2: field 'text' holds list, not text"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}', "a.jsonl:2 is not UTF-8: byte 0xff at offset 29 of the file"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: field 'text' is not Unicode text"),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good one"}'.ljust(18) + b"\n" + line + b"\n")
    assert expected.replace("offset 29", f"offset {21 + 10}") in refusal(tmp_path / "a.jsonl")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert "has no field 'text' (its fields: 'body', 'id')" in refusal(tmp_path / "a.parquet")


def test_parquet_column_that_is_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "field 'text' holds int, not text" in refusal(tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "good.parquet")
    content = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.parquet").write_text("hello, I am text")
    for name in ("cut.parquet", "other.parquet"):
        assert name in refusal(tmp_path / name)


def test_unreadable_file(public_dir: Path) -> None:
    (public_dir / "a.txt").write_text("x")
    (public_dir / "a.txt").chmod(0)
    with unprivileged():
        assert "cannot read" in (message := refusal(public_dir / "a.txt"))
    assert "Permission denied" in message


def test_unreadable_directories(public_dir: Path) -> None:
    (public_dir / "closed").mkdir(mode=0)
    (public_dir / "b.txt").write_text("x")
    with unprivileged():
        for path in (public_dir, public_dir / "closed", public_dir / "closed/a.txt"):
            message = refusal(path)
            assert "cannot read" in message
            assert "Permission denied" in message
