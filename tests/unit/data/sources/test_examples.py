"""Rows as examples: which text they become, and which of its tokens have a loss. The reference is transformers."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from transformers import PreTrainedTokenizerFast

from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.prepare import Prepared, prepare
from megatrain.data.sources.chat import PARAGRAPHS, Conversation
from megatrain.data.sources.examples import RowExamples, UnusableRowError
from megatrain.data.tokenizer import TiktokenTokenizer, Tokenizer, train_bpe
from megatrain.data.tokenizer_files import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = PLAIN_CHATML.replace(
    "{{ m['content'] }}<|im_end|>{% else",
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|im_end|>{% else",
)
"""Like Qwen3's: thoughts stay in the last message only."""
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Héllo,  wörld?\n"},
    {"role": "assistant", "content": "  Yes:\n\n\tword 漢字 <|im_end|> 🎉 "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "That is all.\n"},
]
Span = tuple[int, int]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with ChatML's tokens, which loses its template's generation marks in `plain`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_bpe(iter(["Hello world, yes: that is all. Be brief. " * 20]), vocab_size=300)
    inner = trained._inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", chat_template=CHATML)
    fast.save_pretrained(folder)
    return folder


def prepared(folder: Path, rows: list[Any], **options: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = options.pop("tokenizer", TokenizerConfig(kind="bytes"))
    cfg = DataConfig(
        kind="chat",
        path=str(path),
        cache_dir=str(folder / "cache"),
        val_fraction=0,
        tokenizer=tokenizer,
        **options,
    )
    return prepare(cfg, progress=lambda phase, share: None)


def said(found: Prepared) -> list[tuple[str, str, bool]]:
    """Text of each example, text of the tokens with a loss, and whether the end token has one."""
    store, decode = found.train, found.tokenizer.decode
    ends = [*store.document_starts[1:], store.n_tokens]
    rows = []
    for begin, end in zip(store.document_starts, ends, strict=True):
        ids, answers = store.tokens[begin : end - 1], store.answers[begin : end - 1]
        assert store.tokens[end - 1] == found.tokenizer.eos_id
        rows.append((decode(ids), decode(ids[answers]), bool(store.answers[end - 1])))
    return rows


@pytest.mark.parametrize(
    ("row", "text", "answers"),
    [
        (
            {"messages": [*TURNS[:3], {"role": "user", "content": "More."}]},
            "system: Be brief.\n\nuser: Héllo,  wörld?\n\n\nassistant:   Yes:\n\n\tword 漢字 <|im_end|> 🎉 \n\nuser: "
            "More.",
            "  Yes:\n\n\tword 漢字 <|im_end|> 🎉 ",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
                "system": "S",
            },
            "system: S\n\nuser: Hi\n\nassistant: Ho",
            "Ho",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "not this"},
            "user: Add.\n\n1 2\n\nassistant: 3",
            "3",
        ),
        ({"instruction": "Say 3.", "input": "", "output": "3"}, "user: Say 3.\n\nassistant: 3", "3"),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=2", "2"),
        (
            {"prompt": TURNS[1:4], "completion": TURNS[4:]},
            "user: Héllo,  wörld?\n\n\nassistant:   Yes:\n\n\tword 漢字 <|im_end|> 🎉 \n\nuser: And?\n\nassistant: "
            "That is all.\n",
            "That is all.\n",
        ),
    ],
)
def test_forms_of_rows(tmp_path: Path, row: dict[str, Any], text: str, answers: str) -> None:
    """Without a chat template: the answer's text has a loss, and the end if the answer ends the text."""
    assert said(prepared(tmp_path, [row])) == [(text, answers, text.endswith(answers))]


def test_a_template_makes_prompt_and_answer(tmp_path: Path) -> None:
    rows = [{"en": "one", "de": "eins", "n": 1}, {"en": "two", "de": "zwei", "n": 2}]
    found = prepared(tmp_path, rows, template="{n}. {en}: ", answer="{de}!")
    assert said(found) == [("1. one: eins!", "eins!", True), ("2. two: zwei!", "zwei!", True)]
    with pytest.raises(UserError, match="no field 'en'"):
        prepared(tmp_path, [{"de": "eins"}], template="{en}: ", answer="{de}")


@pytest.mark.parametrize("template", [CHATML, PLAIN_CHATML])
def test_tokens_and_loss_are_those_of_transformers(directory: Path, tmp_path: Path, template: str) -> None:
    """The loss of a template without marks differs in the line break after the end of a turn alone."""
    reference = PreTrainedTokenizerFast.from_pretrained(directory, chat_template=CHATML)
    truth = reference.apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    described = json.loads((directory / "tokenizer_config.json").read_text())
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (own / "tokenizer_config.json").write_text(json.dumps(described))
    (own / "chat_template.jinja").write_text(template)
    found = prepared(
        tmp_path, [{"messages": TURNS}], tokenizer=TokenizerConfig(kind="huggingface", path=str(own))
    )
    assert found.train.tokens[:-1].tolist() == truth["input_ids"]
    answers = found.train.answers.copy()
    assert not answers[-1]  # the template itself ends the turn with the end-of-text token
    marks = np.array(truth["assistant_masks"], dtype=bool)
    breaks = np.flatnonzero(answers[:-1] != marks)
    assert (len(breaks) == 0) == (template == CHATML)
    assert set(found.train.tokens[breaks].tolist()) <= set(reference.encode("\n", add_special_tokens=False))
    # The tokenizer keeps its template: in the cache, and in what is exported.
    assert isinstance(found.directory, Path)
    found.tokenizer.save_pretrained(tmp_path / "own")  # type: ignore[attr-defined]
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "own")
    assert again.apply_chat_template(TURNS, tokenize=False) == reference.apply_chat_template(
        TURNS, tokenize=False
    )
    assert load_tokenizer(found.directory / "tokenizer").described["chat_template"] == template  # type: ignore[attr-defined]


def test_a_template_that_rewrites_earlier_answers_gives_an_example_for_each() -> None:
    turns = [*TURNS[1:2], {"role": "assistant", "content": "<think>a</think>b"}, *TURNS[3:]]
    rows = RowExamples("text", None, None, Conversation(FORGETFUL, {"eos_token": "<|im_end|>"}))
    found = rows.examples({"messages": turns}, "here")
    assert [text[begin:end] for text, ((begin, end),), *_ in found] == [
        "<think>a</think>b<|im_end|>\n",
        "That is all.\n<|im_end|>\n",
    ]
    assert "<think>" not in found[1].text
    pickle.dumps(rows)  # to be sent to the processes that read


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS[:2]}, "no answer of the assistant"),
        ({"messages": []}, "empty"),
        ({"messages": None}, "null"),
        ({"messages": "nothing"}, "not a list of messages"),
        ({"messages": [*TURNS[:2], {"role": "assistant", "content": " "}]}, "empty answer"),
        ({"prompt": "1+1=", "completion": ""}, "empty answer"),
        ({"prompt": "1+1=", "completion": None}, "null"),
        ({"instruction": 3, "output": "x"}, "a field that is not text"),
        ({"text": "x"}, "neither a conversation"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[4]]},
            "parts that are not text",
        ),
    ],
)
def test_a_row_that_gives_no_example_is_counted_and_named(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        RowExamples("text", None, None, PARAGRAPHS).examples(row, "here")
    found = prepared(tmp_path, [{"prompt": "1+1=", "completion": "2"}, row])
    assert found.contents is not None
    (group,) = found.contents.left_out.as_json()
    assert group["unit"] == "row"
    assert reason in group["reason"]
    assert group["examples"] == ["rows.jsonl:2"]
    with pytest.raises(UserError, match=r"data\.on_skip=error"):
        prepared(tmp_path, [{"prompt": "1+1=", "completion": "2"}, row], on_skip="error")


def test_a_template_that_refuses_a_row_leaves_it_out() -> None:
    strict = Conversation("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UnusableRowError, match="roles must alternate"):
        RowExamples("text", None, None, strict).examples({"messages": TURNS}, "here")


def test_files_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gives no examples .*neither a conversation"):
        prepared(tmp_path, [{"text": "x"}])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"gives no examples \(its fields: 'text'\)"):
        prepare(DataConfig(kind="chat", path=str(tmp_path / "t.parquet")), progress=lambda phase, share: None)


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": [TURNS], "id": [1], "system": [None]}), tmp_path / "t.parquet")
    cfg = DataConfig(
        kind="chat",
        path=str(tmp_path / "t.parquet"),
        cache_dir=str(tmp_path),
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    ((_, answers, ended),) = said(prepare(cfg, progress=lambda phase, share: None))
    assert answers == TURNS[2]["content"] + TURNS[4]["content"]
    assert ended


def tokenizers(folder: Path) -> list[Tokenizer]:
    ranks = {bytes([n]): n for n in range(256)} | {"é".encode(): 256, b"or": 257, b"  ": 258}
    return [
        load_tokenizer(prepared(folder, [{"prompt": "a", "completion": "b"}]).directory / "tokenizer"),  # type: ignore[operator]
        TiktokenTokenizer(ranks, eos_id=300, pattern=r"\s+|\S+"),
        train_bpe(iter(["Héllo wörld, yes: word 漢字"] * 9), vocab_size=290),
    ]


def test_places_of_tokens(tmp_path: Path) -> None:
    """A token's place holds the characters that its bytes are part of; ids are those of `encode_batch`."""
    texts = [TURNS[1]["content"], TURNS[2]["content"], "", "<|endoftext|>"]
    assert tiktoken is not None
    for tokenizer in tokenizers(tmp_path):
        sizes = tokenizer.token_bytes()
        plain = tokenizer.encode_batch(texts)
        for text, ids, (own, places) in zip(texts, plain, tokenizer.encode_places(texts), strict=True):
            np.testing.assert_array_equal(own, ids)
            ends = np.cumsum(sizes[ids])
            for (first, after), begin, end in zip(places.tolist(), ends - sizes[ids], ends, strict=True):
                assert len(text[:first].encode()) <= begin < len(text[: first + 1].encode())
                assert len(text[: after - 1].encode()) < end <= len(text[:after].encode())
