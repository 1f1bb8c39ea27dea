"""Labelled rows and pairs of answers: what they become in the store, and in the samples that are made of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig, TokenizerConfig
from megatrain.data.labels import LabelSet, label_set
from megatrain.data.loader import IGNORED, Loader
from megatrain.data.packing import pack
from megatrain.data.prepare import prepare
from megatrain.data.store import TokenStore

EOS = 256
ROWS: list[dict[str, Any]] = [
    {"text": "good", "label": "yes"}, {"text": "bad one", "label": "no"}, {"text": "fine", "label": " yes "},
    {"text": "", "label": "no"}, {"text": "without", "label": None}, {"text": "again good", "label": "yes"},
]  # fmt: skip


def store_of(folder: Path, rows: list[dict[str, Any]], kind: Any, **options: Any) -> tuple[TokenStore, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(
        kind=kind, path=str(path), cache_dir=str(folder / "cache"), tokenizer=TokenizerConfig(kind="bytes"),
        **{"val_fraction": 0.0} | options,
    )  # fmt: skip
    found = prepare(cfg, progress=lambda phase, share: None)
    assert isinstance(found.train, TokenStore)
    return found.train, found


def texts_of(store: TokenStore) -> list[str]:
    ends = [*store.document_starts[1:].tolist(), store.n_tokens]
    return [
        bytes(store.tokens[begin : end - 1].tolist()).decode()
        for begin, end in zip(store.document_starts.tolist(), ends, strict=True)
    ]


def test_each_document_has_its_label_at_its_last_token(tmp_path: Path) -> None:
    store, found = store_of(tmp_path, ROWS, "classify")
    assert store.label_set == LabelSet(("no", "yes"), False)
    assert found.contents.left_out.total() == 2
    labels = dict(zip(texts_of(store), np.asarray(store.labels).tolist(), strict=True))
    assert labels == {"good": 1, "bad one": 0, "fine": 1, "again good": 1}
    packed = pack(store, seq_len=16)
    loader = Loader(packed, 16, packed.n_rows, packed.n_rows, seed=0, mask_documents=True, prefetch=0)
    step = loader.step_batch(0)
    (batch,) = step.micro_batches
    assert step.valid_tokens == 4
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        begin = 0
        for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            assert (target == IGNORED) == (token != EOS)
            if token == EOS:
                assert target == labels[bytes(tokens[begin:place]).decode()]
                begin = place + 1


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 0.0], ("0", "1")),
        (["b", "a"], ("a", "b")),
    ],
)
def test_names_of_labels(tmp_path: Path, given: list[Any], names: tuple[str, ...]) -> None:
    store, _ = store_of(tmp_path, [{"text": f"row {n}", "label": x} for n, x in enumerate(given)], "classify")
    assert store.label_set is not None
    assert store.label_set.names == names


def test_lists_of_labels_are_bits(tmp_path: Path) -> None:
    rows = [
        {"body": "one", "tags": ["x", "z"]},
        {"body": "two", "tags": []},
        {"body": "three", "tags": '["y"]'},
    ]
    store, _ = store_of(tmp_path, rows, "classify", text_field="body", label_field="tags")
    assert dict(zip(texts_of(store), np.asarray(store.labels).tolist(), strict=True)) == {
        "one": 0b101,
        "two": 0,
        "three": 0b010,
    }
    assert store.label_set is not None
    other = store.label_set.renumbered(np.array([0b101, 0, 0b010]), ("z", "w", "y", "x"))
    assert other.tolist() == [0b1001, 0, 0b0100]


def test_labels_that_cannot_be_told() -> None:
    with pytest.raises(UserError, match="Write lists everywhere, or nowhere"):
        label_set(["a", ("b",)])
    with pytest.raises(UserError, match="at most 62"):
        label_set([tuple(str(n) for n in range(63))])


def test_a_missing_label_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no field 'label' \(its fields: 'text', 'class'\); data.label_field"
    ):
        store_of(tmp_path, [{"text": "a", "class": "b"}], "classify")


PAIRS: list[dict[str, Any]] = [
    {"prompt": f"{n}? ", "chosen": f"yes {n}", "rejected": "no" * (n % 5 + 1)} for n in range(40)
]


def test_both_answers_of_a_pair_stay_together(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b"}]
    store, found = store_of(tmp_path, rows, "preferences", val_fraction=0.3)
    assert {each["reason"] for each in found.contents.left_out.as_json()} == {
        "chosen and rejected answer are the same",
        "no chosen and rejected answer",
    }
    assert isinstance(found.val, TokenStore)
    for part in (store, found.val):
        texts = texts_of(part)
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        assert all(
            (a + "|" + b) in {f"{r['prompt']}{r['chosen']}|{r['prompt']}{r['rejected']}" for r in PAIRS}
            for a, b in pairs
        )
        assert part.together == 2
    assert len(store.document_starts) + len(found.val.document_starts) == 80
    assert len(found.val.document_starts) > 0
    packed = pack(store, seq_len=48)
    for row in range(packed.n_rows):
        numbers = packed.examples_of(row * 48, 48)
        assert [n ^ 1 for n in numbers[::2]] == numbers[1::2]
        assert all(n % 2 == 0 for n in numbers[::2])
    sums = packed.lengths.reshape(-1, 2).sum(1)
    assert len(pack(store, seq_len=int(sums.max()) - 1).left_out()) == 2 * int((sums == sums.max()).sum())


def test_pairs_of_conversations(tmp_path: Path) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    rows = [
        {"chosen": said("q", "good"), "rejected": said("q", "bad")},
        {"prompt": said("q"), "chosen": said("", "fine")[1:], "rejected": said("", "poor")[1:]},
        {"prompt": said("q"), "chosen": "text", "rejected": "other"},
    ]
    store, _ = store_of(tmp_path, rows, "preferences")
    assert [text.rsplit(" ", 1)[-1] for text in texts_of(store)] == [
        "good",
        "bad",
        "fine",
        "poor",
        "text",
        "other",
    ]
    assert store.answers is not None
    for text, begin in zip(texts_of(store), store.document_starts.tolist(), strict=True):
        marked = bytes(
            store.tokens[begin : begin + len(text)][store.answers[begin : begin + len(text)]].tolist()
        )
        assert marked.decode() == text.rsplit(" ", 1)[-1]
