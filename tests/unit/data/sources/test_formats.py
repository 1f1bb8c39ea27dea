"""Files in the formats that people have: every one gives its texts, and what is left out is said."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import prepare
from megatrain.data.sources import streams
from megatrain.data.sources.chat import read_conversation
from megatrain.data.sources.corpus import Corpus, find_corpus
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.parts import scan, units
from megatrain.data.template import template_parts
from megatrain.data.tokenizer import train_bpe

CORPORA = Path(__file__).parents[3] / "corpora"
"""Files that pandas, datasets, jq, gzip and others wrote (make.py)."""
LINES = [f'Entry {n}: the "square" of {n} is {n * n},\nand its cube {n**3} — größer.' for n in range(1, 41)]
TEXTS = [line for n, line in enumerate(LINES) if n != 7]
BOOK = "\n".join(TEXTS) + "\n"


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def left_out(corpus: Corpus) -> dict[str, int]:
    """What listing and reading leave out: reason -> number."""
    found = LeftOut(corpus.unlisted)
    list(corpus.documents(found))
    return {group.reason: group.count for group in found}


def refusal(path: Path | str, **how: str) -> str:
    with pytest.raises(UserError) as caught:
        texts(find_corpus(str(path), **how))
    return str(caught.value)


# --- real files ---


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("reviews.csv", "review"),
        ("reviews.tsv.bz2", "review"),
        ("semicolons.csv.gz", "review"),
        ("articles.parquet", "text"),
        ("articles.feather", "text"),
        ("articles.jsonl.zst", "text"),
        ("c4.json.gz", "text"),
        ("records.json", "text"),
        ("columns.json", "text"),
        ("saved", "text"),
    ],
)
def test_rows_of_real_files(name: str, field: str) -> None:
    corpus = find_corpus(str(CORPORA / name), text_field=field)
    assert texts(corpus) == TEXTS
    reasons = left_out(corpus)
    # CSV can't tell a null from an empty text.
    assert reasons.pop("empty" if "sv" in name else "null") == 1
    assert reasons == ({"metadata of a data set": 2} if name == "saved" else {})


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("book.txt.gz", "auto"), ("utf16.txt", "auto"), ("latin1.txt", "latin-1"), ("latin1.txt.xz", "latin-1")],
)
def test_real_texts(name: str, encoding: str) -> None:
    expected = BOOK if encoding == "auto" else BOOK.replace("—", "-")
    assert texts(find_corpus(str(CORPORA / name), encoding=encoding)) == [expected]


def test_the_training_split_of_a_saved_dictionary_is_read() -> None:
    corpus = find_corpus(str(CORPORA / "saved_dict"))
    assert len(texts(corpus)) == 30 - left_out(corpus).get("null", 0)
    assert set(texts(corpus)) < set(TEXTS)
    assert left_out(corpus)["split test; name it in data.path to train on it"] == 1
    assert len(texts(find_corpus(str(CORPORA / "saved_dict/test")))) in (9, 10)


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000001.tgz"])
def test_webdataset_shards(name: str) -> None:
    corpus = find_corpus(str(CORPORA / name))
    lines = BOOK.splitlines(keepends=True)
    assert sorted(texts(corpus)) == sorted("".join(lines[n * 10 - 1 : n * 10 + 9]) for n in (1, 2, 3))
    # Without the order of names, metadata may lie apart from its text.
    assert sum(left_out(corpus).values()) == 3
    assert name.endswith("tgz") or left_out(corpus) == {"metadata of a sample": 3}


def test_a_zip_archive_is_a_folder() -> None:
    corpus = find_corpus(str(CORPORA / "books.zip"))
    assert len(texts(corpus)) == 3
    assert left_out(corpus) == {"JSON without the field text": 3}
    assert len(texts(find_corpus(str(CORPORA / "books.zip"), text_field="url"))) == 6


def test_alpaca_by_a_template() -> None:
    message = refusal(CORPORA / "alpaca.json")
    assert r"as in 'data.template={instruction}\n{input}\n{output}\n'" in message
    found = texts(find_corpus(str(CORPORA / "alpaca.json"), template=r"{instruction}\n{input}\n{output}"))
    assert found[:2] == ["Square the number 1.\n1\nIt is 1.", "Square the number 2.\n\nIt is 4."]
    assert len(found) == 40


def test_conversations() -> None:
    sharegpt = texts(find_corpus(str(CORPORA / "sharegpt.json")))
    assert sharegpt[1] == "user: Square the number 2.\n\nassistant: It is 4."
    messages = texts(find_corpus(str(CORPORA / "messages.jsonl")))
    assert messages[1] == "system: Answer.\n\nuser: Square the number 2.\n\nassistant: It is 4."


def test_conversations_by_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}\n"
        "{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    described = {"eos_token": {"content": "</s>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    conversation = read_conversation(TokenizerConfig(kind="huggingface", path=str(tmp_path)))
    found = texts(find_corpus(str(CORPORA / "sharegpt.json"), conversation=conversation))
    assert found[1] == "<|user|>\nSquare the number 2.</s>\n<|assistant|>\nIt is 4.</s>\n"


def test_special_tokens_of_a_chat_template_become_their_ids_as_transformers_has_it(tmp_path: Path) -> None:
    """The reference is `apply_chat_template`; what a plain text spells stays text."""
    transformers = pytest.importorskip("transformers")
    trained = train_bpe(iter(LINES), vocab_size=300)
    trained._inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "tok").mkdir()
    trained.save_pretrained(tmp_path / "tok")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    message = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
    reference.chat_template = f"{{% for m in messages %}}{{{{ {message} }}}}{{% endfor %}}"
    reference.save_pretrained(tmp_path / "tok")
    messages = [{"role": "user", "content": "Square 2."}, {"role": "assistant", "content": "It is 4."}]
    rows = [{"messages": messages}, {"messages": json.dumps(messages)}]
    plain = "a <|im_end|> in a text"
    lines = [json.dumps(row) + "\n" for row in (*rows, {"text": plain})]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    cfg = DataConfig(
        path=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        val_fraction=0.0,
        tokenizer=TokenizerConfig(kind="huggingface", path=str(tmp_path / "tok")),
    )
    found = prepare(cfg, progress=lambda *_: None)
    first, written, second = np.split(np.asarray(found.train.tokens), found.train.document_starts[1:])
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert first[:-1].tolist() == written[:-1].tolist() == expected
    assert reference.convert_tokens_to_ids("<|im_end|>") in first
    assert found.tokenizer.decode(second) == plain


def test_conversations_lose_nothing(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "square", "arguments": '{"n": 2}'}}
    image = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": "x.png"}]
    rows = [
        {"system": "Answer.", "conversations": [{"from": "human", "value": "hi"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": image}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = find_corpus(str(tmp_path / "a.jsonl"))
    assert texts(corpus) == [
        "system: Answer.\n\nuser: hi",
        f"assistant: {json.dumps([call])}",
        "user: ab",
    ]
    assert left_out(corpus) == {"conversation with parts that are not text": 1}


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert "a.csv has 2 fields of the name 'text'" in refusal(tmp_path / "a.csv")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet has 2 fields of the name 'text'" in refusal(tmp_path / "a.parquet")


def test_tables_without_the_field_are_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sizes.csv").write_text("chip,size\na,1\n")
    (tmp_path / "a.md").write_text("a text")
    corpus = find_corpus(str(tmp_path))
    assert texts(corpus) == ["a text"]
    assert left_out(corpus) == {"CSV without the field text": 1}


def test_a_wrong_field_is_named_before_the_work(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"a{n:02}.txt").write_text("text")
    (tmp_path / "z.jsonl").write_text('{"body": "x"}\n')
    cfg = DataConfig(
        path=str(tmp_path), cache_dir=str(tmp_path / "c"), tokenizer=TokenizerConfig(kind="bytes")
    )
    phases: list[tuple[str, float]] = []
    with pytest.raises(UserError, match=r"z.jsonl:1 has no field 'text' \(its fields: 'body'\)"):
        prepare(cfg, progress=lambda *told: phases.append(told))
    assert phases == [("reading", 0.0)]


def test_rows_of_nulls_and_conversations_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": null, "b": null}\n{"a": "x", "b": null}\n')
    corpus = find_corpus(str(tmp_path / "a.jsonl"), template="{a}: {b}")
    assert texts(corpus) == ["x: "]
    assert left_out(corpus) == {"null": 1}
    (tmp_path / "c.jsonl").write_text('{"messages": []}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    corpus = find_corpus(str(tmp_path / "c.jsonl"))
    assert texts(corpus) == ["user: hi"]
    assert left_out(corpus) == {"empty": 1}
    (tmp_path / "c.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""hi""}]"\n')
    assert texts(find_corpus(str(tmp_path / "c.csv"))) == ["user: hi"]


def test_joined_archives(tmp_path: Path) -> None:
    content = (CORPORA / "shard-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content + content)
    assert "goes on after its archive ends" in refusal(tmp_path / "a.tar")


def test_a_folder_of_everything_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("read me")
    for name in ("c4.json.gz", "articles.parquet", "utf16.txt"):
        (tmp_path / name).write_bytes((CORPORA / name).read_bytes())
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\nsome text")
    (tmp_path / ".git").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path.parent / "elsewhere").mkdir(exist_ok=True)
    (tmp_path.parent / "elsewhere" / "a.txt").write_text("linked text")
    (tmp_path.parent / "elsewhere" / "loop").symlink_to(tmp_path.parent / "elsewhere")
    corpus = find_corpus(str(tmp_path))
    assert sorted(texts(corpus)) == sorted(["read me", "linked text", BOOK, *TEXTS, *TEXTS])
    assert left_out(corpus) == {
        "hidden": 1, "broken link": 1, "link to a folder above it": 1, "null": 2, "not text, .pdf": 1,
    }  # fmt: skip


def test_a_list_and_a_url(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    assert texts(find_corpus((str(tmp_path / "b.jsonl.gz"), str(tmp_path / "*.txt")))) == ["b", "a"]
    assert texts(find_corpus(f"file://{tmp_path}/b.jsonl.gz")) == ["b"]
    assert texts(find_corpus(f"local://{tmp_path}")) == ["a", "b"]


def test_addresses_that_lead_nowhere() -> None:
    assert "there is no file at this address" in refusal("memory://nothing/here")
    assert "Protocol not known: nosuch" in refusal("nosuch://bucket/a.txt")
    assert "pip install" in refusal("abfs://bucket/a.txt")


# --- damaged, refused ---


@pytest.mark.parametrize("name", ["c4.json.gz", "reviews.tsv.bz2", "latin1.txt.xz", "articles.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compressed_files(name: str, damage: str, tmp_path: Path) -> None:
    content = (CORPORA / name).read_bytes()
    middle = len(content) // 2
    broken = (
        content[:-9]
        if damage == "cut"
        else content[:middle] + b"\xff\x00\xff\x00" * 4 + content[middle + 16 :]
    )
    (tmp_path / name).write_bytes(broken)
    message = refusal(
        tmp_path / name, text_field="review" if "reviews" in name else "text", encoding="latin-1"
    )
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("name", ["shard-000000.tar", "books.zip", "articles.feather"])
def test_damaged_containers(name: str, tmp_path: Path) -> None:
    content = (CORPORA / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert f"{name} is not a readable" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["data.xlsx", "data.avro", "data.7z", "table.sqlite"])
def test_known_formats_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / name).write_bytes(b"\0\1\2")
    assert f"{name}: {Path(name).suffix} is a format that is not read" in refusal(tmp_path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_refused(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "EXPANSION_FLOOR", 1 << 20)
    end = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    (tmp_path / f"a.txt.{end}").write_bytes(compress(b" " * (4 << 20)))
    assert "expands to more than" in refusal(tmp_path / f"a.txt.{end}")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", " " * (4 << 20))
    assert "expands to more than" in refusal(tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n", "has no field 'text' (its fields: 'a', 'b')"),
        ("text,b\n1,2\n3\n", "row 2 has 1 values, but there are 2 columns"),
        ('text,b\n"1,2\n', "is not CSV"),
        ("[1, 2]", "is not a JSON object"),
        ('{"rows": 3}', "has no field 'text' (its fields: 'rows')"),
        ('{"text": "a"', "is not JSON"),
    ],
)
def test_wrong_tables(content: str, expected: str, tmp_path: Path) -> None:
    name = "a.json" if content[0] in "[{" else "a.csv"
    (tmp_path / name).write_text(content)
    assert expected in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('\n{"text": "a"}\n\n', ["a"]),
        ('["a", "", "b"]', ["a", "b"]),
        ('{"version": 2, "data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
        ('{"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}}', ["a", "b"]),
        ('\ufeff[{"text": "ü"}]', ["ü"]),
        ('"only a text"', ["only a text"]),
    ],
)
def test_forms_of_json(content: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert texts(find_corpus(str(tmp_path / "a.json"))) == expected


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), max_size=20),
        max_size=9,
    )
)
def test_csv_is_read_as_pyarrow_reads_it(rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    pa_csv.write_csv(pa.table({"text": pa.array(rows, pa.string()), "n": range(len(rows))}), str(file))
    options = pa_csv.ParseOptions(newlines_in_values=True)
    convert = pa_csv.ConvertOptions(column_types={"text": pa.string()}, strings_can_be_null=False)
    expected = pa_csv.read_csv(str(file), parse_options=options, convert_options=convert)["text"].to_pylist()
    assert texts(find_corpus(str(file))) == [text for text in expected if text]


def test_settings_in_json_are_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x", "references": [{"path": "a"}]}')
    (tmp_path / "index.js").write_text("let a = 1")
    corpus = find_corpus(str(tmp_path))
    assert texts(corpus) == ["let a = 1"]
    assert left_out(corpus) == {"JSON without the field text": 1}
    assert "has no field 'text'" in refusal(tmp_path / "package.json")


def test_members_of_archives_that_are_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (
            ("a.txt", b"text"),
            ("b.jpg", b"\xff\xd8\xff\0"),
            ("c.tar", b""),
            ("d.txt.gz", gzip.compress(b"zipped")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    corpus = find_corpus(str(tmp_path / "a.tar"))
    assert texts(corpus) == ["text", "zipped"]
    assert left_out(corpus) == {"not text, .jpg": 1, "archive in an archive": 1, "link in an archive": 1}


@pytest.mark.parametrize("template", ["no field", "{", "{}", "{a!r}", "{a:>3}", "}"])
def test_wrong_templates(template: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - some of the messages are Python's
        template_parts(template)


# --- units ---


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_cutting_a_file_changes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"a.{kind}"
    rows = [f"zeile {n} ü" * (n % 7) for n in range(2000)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": rows}), file, row_group_size=90)
    else:
        file.write_text(
            "\n\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows), encoding="utf-8"
        )
    whole = list(find_corpus(str(file)).documents())
    for module in ("megatrain.data.sources.parts.UNIT_BYTES",):
        monkeypatch.setattr(module, 3000)
    monkeypatch.setattr("megatrain.data.sources.parts.CHUNK", 700)
    corpus = find_corpus(str(file))
    found = units(corpus, [scan(corpus, 0)])
    assert len(found) > 5
    assert [d for parts, _ in found for d in corpus.documents(parts=parts)] == whole


def test_skipping_can_be_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "some text"}\n{"text": null}\n')
    cfg = {
        "path": str(tmp_path / "in"),
        "cache_dir": str(tmp_path / "c"),
        "tokenizer": TokenizerConfig(kind="bytes"),
    }
    for hidden in (False, True):
        if hidden:
            os.mkdir(tmp_path / "in" / ".git")
        with pytest.raises(UserError, match="hidden" if hidden else r"1 row \(null\): a.jsonl:2"):
            prepare(DataConfig(on_skip="error", **cfg), progress=lambda *_: None)
        found = prepare(DataConfig(**cfg), progress=lambda *_: None)
        assert found.contents is not None
        assert found.contents.left_out.summary().startswith(
            "1 row (null)" if not hidden else "1 file (hidden)"
        )
