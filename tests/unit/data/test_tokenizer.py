"""Tokenizers: exact round trips, exact byte counts, and agreement with the libraries they come from."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as tk
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatrain.config.errors import UserError
from megatrain.data import tokenizer_files as module
from megatrain.data.config import TokenizerConfig
from megatrain.data.sources.corpus import find_corpus
from megatrain.data.tokenizer import EOS, ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe
from megatrain.data.tokenizer_files import load_tokenizer, read_tokenizer, tokenizer_files

CL100K_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HARD_TEXTS = [
    "",
    " ",
    "\r\n\r \t\n",
    f"a {EOS} b",
    "def f(x):\n    return x  # ünï 日本語 🙂‍↔️\n",
    "\ufeff\u0000\u200d\U0010ffff",
    "   leading and trailing   ",
    "1234567890 it's I'LL",
]


def corpus() -> list[str]:
    """About 1 MB of the standard library."""
    documents = find_corpus(None).documents()
    return [d.text for d in documents if d.id.split("/")[0] in ("asyncio", "email", "json", "html")]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus()


@pytest.fixture(scope="module")
def bpe(texts: list[str]) -> HuggingFaceTokenizer:
    return train_bpe(iter(texts), vocab_size=1000)


@pytest.fixture(scope="module")
def ranks_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiktoken file of 600 ranks, made from a BPE that `tokenizers` trained with the pattern of cl100k."""
    inner = tk.Tokenizer(tk.models.BPE())
    split = tk.pre_tokenizers.Split(tk.Regex(CL100K_LIKE), behavior="isolated")
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = tk.pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(
        texts, tk.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    directory = tmp_path_factory.mktemp("ranks")
    inner.save(str(directory / "reference.json"))
    byte_of = bytes_of_gpt2_alphabet()
    lines = []
    for token, rank in sorted(inner.get_vocab().items(), key=lambda pair: pair[1]):
        lines.append(f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n")
    (directory / "ranks.tiktoken").write_text("".join(lines))
    return directory / "ranks.tiktoken"


def bytes_of_gpt2_alphabet() -> dict[str, int]:
    """GPT-2's map from characters to bytes: printable bytes are themselves, the rest follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.fixture(scope="module", params=["bytes", "bpe", "tiktoken"])
def exact(request: pytest.FixtureRequest) -> Tokenizer:
    """Each tokenizer that must be exact on any text."""
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    path = request.getfixturevalue("ranks_file")
    return read_tokenizer(TokenizerConfig(kind="tiktoken", path=str(path)))


# --- exactness ---


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(text=st.text())
@example("a" * 5000)
@example(f"a {EOS} b")
def test_round_trip_of_any_text(exact: Tokenizer, text: str) -> None:
    ids = exact.encode(text)
    assert exact.decode(ids) == text
    assert exact.eos_id not in ids
    assert all(0 <= i < exact.vocab_size for i in ids)
    assert exact.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_of_hard_text(exact: Tokenizer, text: str) -> None:
    assert exact.decode(exact.encode(text)) == text


def test_special_and_unknown_ids_have_no_text(exact: Tokenizer) -> None:
    ids = exact.encode("abc")
    assert exact.decode([exact.eos_id, *ids, exact.eos_id, exact.vocab_size + 7]) == "abc"
    assert exact.token_bytes().shape == (exact.vocab_size,)
    assert exact.token_bytes()[exact.eos_id] == 0


def test_save_and_load(exact: Tokenizer, tmp_path: Path) -> None:
    exact.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert type(again) is type(exact)
    assert (again.vocab_size, again.eos_id, again.digest()) == (
        exact.vocab_size,
        exact.eos_id,
        exact.digest(),
    )
    assert np.array_equal(again.token_bytes(), exact.token_bytes())
    for text in HARD_TEXTS:
        assert again.encode(text) == exact.encode(text)


def test_batches_equal_single_texts(exact: Tokenizer) -> None:
    batch = exact.encode_batch(HARD_TEXTS)
    assert [ids.tolist() for ids in batch] == [exact.encode(text) for text in HARD_TEXTS]
    assert all(ids.dtype == np.uint32 for ids in batch)


# --- BPE ---


def test_training_is_deterministic(texts: list[str], bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    train_bpe(iter(texts), vocab_size=1000).save(tmp_path / "again")
    bpe.save(tmp_path / "first")
    again, first = ((tmp_path / d / "tokenizer.json").read_bytes() for d in ("again", "first"))
    assert again == first


def test_training_compresses(texts: list[str], bpe: HuggingFaceTokenizer) -> None:
    assert bpe.vocab_size == 1000
    text = "\n".join(texts)
    assert len(text.encode()) / len(bpe.encode(text)) > 2.5


def test_little_text_gives_fewer_tokens() -> None:
    small = train_bpe(iter(["aaaa"]), vocab_size=1000)
    assert 257 <= small.vocab_size < 262
    assert small.decode(small.encode("xyz ü")) == "xyz ü"


def test_ids_are_those_of_the_library(bpe: HuggingFaceTokenizer, texts: list[str], tmp_path: Path) -> None:
    bpe.save(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=EOS
    )
    for text in texts[:20]:
        assert bpe.encode(text) == fast(text, add_special_tokens=False).input_ids


# --- Hugging Face directories ---


def hugging_face_directory(
    directory: Path, texts: list[str], kind: str
) -> transformers.PreTrainedTokenizerFast:
    """Write a directory as transformers does; kind `gpt2` or `llama` (SentencePiece's conventions)."""
    if kind == "gpt2":
        inner = tk.ByteLevelBPETokenizer()
        inner.train_from_iterator(texts, vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False)
        core = inner._tokenizer
        core.post_processor = tk.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    else:
        core = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>"))
        core.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        core.decoder = tk.decoders.Sequence(
            [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
        )
        specials = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        core.train_from_iterator(
            texts, tk.trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
        )
        core = without_added_bytes(core)
    core.enable_truncation(5)  # a saved setting that must not cut our documents
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    fast.save_pretrained(directory)
    return fast


def without_added_bytes(core: tk.Tokenizer) -> tk.Tokenizer:
    """Byte tokens belong to the vocabulary but are no special tokens."""
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return tk.Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_directory(kind: str, texts: list[str], tmp_path: Path) -> None:
    fast = hugging_face_directory(tmp_path, texts, kind)
    ours = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path)))
    assert ours.eos_id == fast.eos_token_id
    assert ours.vocab_size == len(fast)
    sizes = ours.token_bytes()
    assert sizes[fast.all_special_ids].sum() == 0
    for text in [*texts[:10], "Über  日本語 🙂"]:
        ids = ours.encode(text)
        assert ids == fast(text, add_special_tokens=False, truncation=False).input_ids
        assert ours.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    from_file = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path / "tokenizer.json")))
    assert from_file.digest() == ours.digest()


def test_added_tokens_that_are_text_count_their_bytes(bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    inner = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_tokens(["<größe>", "<size>"])
    inner.save(str(tmp_path / "more.json"))
    ours = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path / "more.json")))
    for text in ("a<größe>b", "a<size>b"):
        ids = ours.encode(text)
        assert max(ids) >= bpe.vocab_size
        assert ours.token_bytes()[ids].sum() == len(text.encode())
    assert ours.decode(ids) == text


def models_that_know_special_tokens() -> dict[str, tk.Tokenizer]:
    """Tokenizers whose model would give special tokens for a text that spells them."""
    letters = ["<unk>", "</s>", "[SEP]", "▁", *"abcSEP</s>[]|<im_end|>"]
    words = {word: i for i, word in enumerate(dict.fromkeys(letters))}
    found = {
        "unigram": tk.Tokenizer(tk.models.Unigram([(w, -1.0) for w in words], unk_id=0)),
        "bpe": tk.Tokenizer(tk.models.BPE(vocab=words, merges=[], unk_token="<unk>", ignore_merges=True)),
        "wordpiece": tk.Tokenizer(
            tk.models.WordPiece(
                words | {f"##{w}": i + len(words) for w, i in words.items()}, unk_token="<unk>"
            )
        ),
        "wordlevel": tk.Tokenizer(tk.models.WordLevel(words, unk_token="<unk>")),
    }
    for inner in found.values():
        inner.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
        inner.add_tokens(["<tool>"])
        inner.add_special_tokens(["</s>", "[SEP]", "<unk>"])
    return found


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece", "wordlevel"])
def test_models_that_know_special_tokens_get_plain_text(kind: str) -> None:
    inner = models_that_know_special_tokens()[kind]
    eos_id, sep_id = inner.token_to_id("</s>"), inner.token_to_id("[SEP]")
    assert {eos_id, sep_id} <= set(inner.encode("</s> [SEP]").ids)
    ours = HuggingFaceTokenizer(inner, eos_id=eos_id)
    ids = ours.encode("a </s> [SEP] <tool> b ü")
    assert {eos_id, sep_id}.isdisjoint(ids)
    assert inner.token_to_id("<tool>") in ids
    assert max(ids) < ours.vocab_size
    if kind == "unigram":
        plain = [inner.token_to_id(c) for c in "a</s>"]
        assert ids[: len(plain)] == plain
    assert ours.encode("a b") == [inner.token_to_id("a"), inner.token_to_id("b")]


def test_an_added_end_token_that_is_spelled_stays_text(bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    inner = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_tokens(["<end>", "<other>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    ours = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path)))
    assert ours.eos_id == bpe.vocab_size
    text = f"a <end>b<other>{EOS}"
    ours.save(tmp_path / "again")
    for each in (ours, load_tokenizer(tmp_path / "again")):
        ids = each.encode(text)
        assert each.eos_id not in ids
        assert bpe.eos_id not in ids
        assert bpe.vocab_size + 1 in ids  # <other> is a token of text
        assert each.decode([*ids, each.eos_id]) == text
        assert each.token_bytes()[ids].sum() == len(text)


def test_vocabulary_and_merges(texts: list[str], tmp_path: Path) -> None:
    inner = tk.ByteLevelBPETokenizer()
    inner.train_from_iterator(texts, vocab_size=500, special_tokens=[EOS], show_progress=False)
    inner.save_model(str(tmp_path))
    ours = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(tmp_path)))
    assert ours.encode(texts[0]) == inner.encode(texts[0]).ids
    assert ours.decode([*ours.encode("x"), ours.eos_id]) == "x"


# --- tiktoken ---


def test_tiktoken_ids_are_those_of_an_independent_bpe(texts: list[str], ranks_file: Path) -> None:
    reference = tk.Tokenizer.from_file(str(ranks_file.parent / "reference.json"))
    ours = read_tokenizer(TokenizerConfig(kind="tiktoken", path=str(ranks_file)))
    assert (ours.vocab_size, ours.eos_id) == (601, 600)
    for text in texts[:20]:
        assert ours.encode(text) == reference.encode(text).ids


# --- wrong inputs ---


def refusal(**fields: object) -> str:
    with pytest.raises(UserError) as caught:
        read_tokenizer(TokenizerConfig(**fields))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["huggingface", "tiktoken"])
def test_missing_path(kind: str, tmp_path: Path) -> None:
    assert "no such file" in refusal(kind=kind, path=str(tmp_path / "none"))


def test_directory_where_a_rank_file_is_wanted(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(kind="tiktoken", path=str(tmp_path))


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    assert "neither tokenizer.json nor vocab.json" in refusal(kind="huggingface", path=str(tmp_path))
    with pytest.raises(UserError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a" in refusal(kind="huggingface", path=str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/vocab.json").write_text("{}")
    (tmp_path / "old/merges.txt").write_text("a b\n")
    assert "are not a BPE model" in refusal(kind="huggingface", path=str(tmp_path / "old"))


def test_no_end_of_text_token(tmp_path: Path) -> None:
    tk.Tokenizer(tk.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert "no end-of-text token" in refusal(kind="huggingface", path=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    assert "Looked for <gone>" in refusal(kind="huggingface", path=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert "is not a JSON object" in refusal(kind="huggingface", path=str(tmp_path))


def test_bad_rank_files(tmp_path: Path) -> None:
    file = tmp_path / "r.tiktoken"
    good = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    for lines, expected in (
        ([*good, "oops"], "r.tiktoken:257 is not a line"),
        ([*good, "!!! 5"], "r.tiktoken:257 is not a line"),
        (good[:200], "lacks 56 of the 256 single bytes"),
        ([*good, "YWI= 7"], "one rank to several tokens"),
    ):
        file.write_text("\n".join(lines))
        assert expected in refusal(kind="tiktoken", path=str(file))


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        train_bpe(iter(["a"]), vocab_size=300)


def test_files_whose_change_matters(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "unrelated.bin").write_text("")
    assert tokenizer_files(TokenizerConfig(kind="huggingface", path=str(tmp_path))) == [
        tmp_path / "tokenizer.json"
    ]
    assert tokenizer_files(TokenizerConfig(kind="bpe", path=str(tmp_path))) == []


def test_patterns_of_published_files_compile() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    single = {bytes([b]): b for b in range(256)}
    for count, published in module._PUBLISHED.items():
        encoding = tiktoken.Encoding(
            "t", pat_str=published.pattern, mergeable_ranks=single, special_tokens={}
        )
        text = "Hello World's 12345 x/y\n\n  日本 END"
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert published.eos_id >= count
