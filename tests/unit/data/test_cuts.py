"""Cuts of long texts: pieces give exactly the tokens of the whole text, as the libraries encode it.

The reference is always the library's own result on the whole text. Texts are made of what makes cutting hard: runs of
white space, CRLF, apostrophes, digits, combining marks, emoji joined by ZWJ, and words without an end.
"""

import base64
import itertools
import random
import re
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
import tokenizers as tk
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from megatrain.config.errors import UserError
from megatrain.data import cuts
from megatrain.data.tokenizer import (
    EOS,
    ByteTokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    train_bpe,
)

ALPHABET = "asſ\u0301日1 \n\r\t'.、/<\x00"
"""A character of each class that a pattern tells apart: letters, one that ends contractions, one that does so without
regard to case, a mark, an ideograph, a digit, white space, signs, and one that belongs to no class."""
HOSTILE = [
    "    ", " \n ", "\r\n", "\r", "\t\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\u180e", "\ufeff", "\x00",
    "'s", "'S", "'ſ", "'LL", "'", "''", "’t", "e\u0301", "\u0301", "a", "A", "ß", "日本", "か\u3099", "が", "가",
    "\u1100\u1161", "\u11a8", "12345", "½", "٣", "Ⅷ", ".", "...", "!\n\n", "/", "</", "<\u0338", "=\u0338", ",\u0338",
    "、", "。\n", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "<|endoftext|>", "</s>", "<think>", "x", " y", "\n z",
]  # fmt: skip
hostile_texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=25).map("".join)


def every_text(alphabet: str, length: int) -> str:
    """Return a De Bruijn sequence: every text of `length` characters of `alphabet` is in it once."""
    k, found = len(alphabet), []
    a = [0] * k * length

    def extend(t: int, p: int) -> None:
        if t > length:
            if length % p == 0:
                found.extend(a[1 : p + 1])
            return
        a[t] = a[t - p]
        extend(t + 1, p)
        for j in range(a[t - p] + 1, k):
            a[t] = j
            extend(t + 1, t)

    extend(1, 1)
    return "".join(alphabet[i] for i in found)


EVERY_TEXT = every_text(ALPHABET, 4)
TRAINING = [EVERY_TEXT[:20_000], *HOSTILE * 3]


def bpe(pre_tokenizer: object, normalizer: object = None, *added: object) -> tk.Tokenizer:
    """A byte-level BPE whose merges go across anything, so that other words give other tokens."""
    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tk.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TRAINING, trainer=trainer)
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, tk.decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_tokens(list(added))
    return inner


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> object:
    return pre_tokenizers.Split(tk.Regex(pattern), behavior=behavior, invert=invert)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS_AND_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def sequence(*stages: object) -> object:
    return pre_tokenizers.Sequence(list(stages))


PROVEN = {
    "GPT-2": (WORDS_AND_BYTES, None),
    "Llama 3": (sequence(split(cuts.CL100K), BYTES), None),
    "cl100k, matches kept": (sequence(split(cuts.CL100K, "removed", invert=True), BYTES), None),
    "Qwen": (sequence(split(cuts.QWEN), BYTES), normalizers.NFC()),
    "o200k": (sequence(split(cuts.O200K), BYTES), normalizers.Sequence([])),
    "o200k, NFC": (sequence(split(cuts.O200K), BYTES), normalizers.Sequence([normalizers.NFC()])),
    "DeepSeek": (
        sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(cuts.DEEPSEEK), BYTES),
        None,
    ),
    "StarCoder": (sequence(pre_tokenizers.Digits(individual_digits=True), WORDS_AND_BYTES), None),
    "ours": (sequence(split(cuts.OURS), BYTES), None),
}
UNPROVEN = {
    "no words": (BYTES, None),
    "a space before the text": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "SentencePiece": (pre_tokenizers.Metaspace(), None),
    "BERT": (pre_tokenizers.BertPreTokenizer(), None),
    "white space": (sequence(pre_tokenizers.Whitespace(), WORDS_AND_BYTES), None),
    "another pattern": (sequence(split(r"\w+|\W+"), BYTES), None),
    "another behavior": (sequence(split(cuts.CL100K, "merged_with_next"), BYTES), None),
    "NFKC": (WORDS_AND_BYTES, normalizers.NFKC()),
    "lower case": (WORDS_AND_BYTES, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "a replacement": (WORDS_AND_BYTES, normalizers.Replace(" ", "\u2581")),
}


@pytest.fixture(scope="module", params=PROVEN)
def proven(request: pytest.FixtureRequest) -> HuggingFaceTokenizer:
    inner = bpe(*PROVEN[request.param])
    return HuggingFaceTokenizer(inner, eos_id=inner.token_to_id(EOS))


def joined(tokenizer: Tokenizer, text: str, size: int) -> list[int]:
    """The tokens of the pieces, one after the other."""
    pieces = list(tokenizer.pieces(text, size=size))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    return np.concatenate(tokenizer.encode_batch(pieces)).tolist()


# --- the claim ---


def test_every_short_text(proven: HuggingFaceTokenizer) -> None:
    """All cuts of a text that contains every text of four characters of the alphabet."""
    normalizer = proven._inner.normalizer
    whole = EVERY_TEXT if normalizer is None else normalizer.normalize_str(EVERY_TEXT)
    words = [word for word, _ in proven._inner.pre_tokenizer.pre_tokenize_str(whole)]
    pieces = list(proven.pieces(EVERY_TEXT, size=1))
    assert len(pieces) > len(EVERY_TEXT) / 20
    found = []
    for piece in pieces:
        text = piece if normalizer is None else normalizer.normalize_str(piece)
        found += [word for word, _ in proven._inner.pre_tokenizer.pre_tokenize_str(text)]
    assert found == words


@settings(derandomize=True, database=None, deadline=None, max_examples=120)
@given(text=hostile_texts, size=st.integers(1, 9))
@example(text="a b", size=1)
def test_pieces_give_the_tokens_of_the_library(proven: HuggingFaceTokenizer, text: str, size: int) -> None:
    whole = proven._inner.encode(text, add_special_tokens=False).ids
    assert joined(proven, text, size) == whole


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """tiktoken's form of `bpe`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = bpe(BYTES).get_vocab()
    del vocabulary[EOS]
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(ordered)}


@pytest.mark.parametrize("pattern", sorted(cuts.WORDS), ids=lambda pattern: pattern[:12])
def test_tiktoken_with_every_pattern(pattern: str, ranks: dict[bytes, int]) -> None:
    """The same patterns in tiktoken's own matcher."""
    tokenizer = TiktokenTokenizer(ranks, eos_id=len(ranks), pattern=pattern)
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert joined(tokenizer, EVERY_TEXT, 1) == reference.encode_ordinary(EVERY_TEXT)
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices(HOSTILE, k=30))
        assert joined(tokenizer, text, generator.randint(1, 9)) == reference.encode_ordinary(text), text


def test_what_the_proof_says_of_unicode() -> None:
    """Letters are letters, signs are neither letters nor marks nor digits, and NFC leaves both sides of a cut alone."""
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    letters = re.compile(f"[{cuts.LETTERS}]")
    signs = re.compile(f"[{cuts.SIGNS}]")
    spaces = {c for c in characters if unicodedata.category(c) in ("Zs", "Zl", "Zp")} | set("\t\n\v\f\r\x85")
    composed = {c: d.split() for c in characters if (d := unicodedata.decomposition(c)) and "<" not in d}
    parts = {chr(int(part, 16)) for pair in composed.values() if len(pair) == 2 for part in pair}
    seconds = {chr(int(pair[1], 16)) for pair in composed.values() if len(pair) == 2}
    for c in characters:
        category = unicodedata.category(c)
        if letters.match(c):
            assert category[0] == "L"
            assert unicodedata.normalize("NFC", c) == c
            assert c not in seconds
        if signs.match(c):
            assert category[0] in "PSZC"
            assert c not in parts
            assert c != "'"
        if not re.match(r"\S", c):
            assert c in spaces or c in "\x1c\x1d\x1e\x1f"
    assert all(not re.match(r"\S", c) for c in spaces)
    assert parts.isdisjoint("0123456789 ")


# --- added and special tokens ---


@settings(derandomize=True, database=None, deadline=None, max_examples=120)
@given(text=hostile_texts, size=st.integers(1, 9))
@example(text="a<th ink><think>    b </s>", size=1)
def test_added_tokens_are_not_cut(text: str, size: int) -> None:
    tokenizer = WITH_ADDED
    assert joined(tokenizer, text, size) == tokenizer._inner.encode(text, add_special_tokens=False).ids


WITH_ADDED = HuggingFaceTokenizer(
    bpe(*PROVEN["Qwen"], "<think>", "a.b", "  ", "    ", tk.AddedToken("12", normalized=False)), eos_id=0
)


def test_added_tokens_that_take_in_white_space_leave_no_cut() -> None:
    text = "a b " * 50
    assert len(list(WITH_ADDED.pieces(text, size=10))) > 10
    for added in ("a b", tk.AddedToken("b", lstrip=True), tk.AddedToken("b", rstrip=True)):
        tokenizer = HuggingFaceTokenizer(bpe(WORDS_AND_BYTES, None, added), eos_id=0)
        assert list(tokenizer.pieces(text, size=10)) == [text]
    tokenizer = HuggingFaceTokenizer(
        bpe(WORDS_AND_BYTES, None, tk.AddedToken("b", single_word=True)), eos_id=0
    )
    assert list(tokenizer.pieces(text, size=10)) == [text]


# --- other tokenizers ---


@pytest.mark.parametrize("name", UNPROVEN)
def test_other_tokenizers_take_a_document_as_one_text(name: str) -> None:
    inner = bpe(*UNPROVEN[name])
    tokenizer = HuggingFaceTokenizer(inner, eos_id=0)
    text = "Hello world, it's 12 o'clock.\r\n " * 20
    assert list(tokenizer.pieces(text, size=8)) == [text]


def test_cutting_would_change_sentencepiece() -> None:
    """Why: a space is put before each piece."""
    inner = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tk.trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(TRAINING, trainer=trainer)
    tokenizer = HuggingFaceTokenizer(inner, eos_id=1)
    text = "unbreakable"
    assert joined(tokenizer, text, 2) == inner.encode(text, add_special_tokens=False).ids
    assert [*tokenizer.encode("unbr"), *tokenizer.encode("eakable")] != tokenizer.encode(text)


@given(text=st.text(max_size=50), size=st.integers(1, 9))
@settings(derandomize=True, database=None, deadline=None, max_examples=50)
def test_bytes_are_cut_anywhere(text: str, size: int) -> None:
    tokenizer = ByteTokenizer()
    assert joined(tokenizer, text, size) == list(text.encode())
    assert all(len(piece) == size for piece in [*tokenizer.pieces(text, size=size)][:-1])


# --- long documents ---


def long_documents() -> dict[str, str]:
    """Documents of about 100,000 to 200,000 characters."""
    generator = random.Random(1)
    return {
        "hostile": "".join(generator.choices(HOSTILE, k=60_000)),
        "base64": base64.b64encode(generator.randbytes(150_000)).decode(),
        "Chinese": "".join(generator.choices("日本語中文字。，", k=100_000)),
        "numbers": "\n".join(str(n) for n in range(50_000)),
        "one letter": "a" * 100_000,
        "spaces": " " * 50_000 + "end",
        "emoji": "👩\u200d👩\u200d👧" * 20_000,
    }


@pytest.mark.parametrize("document", long_documents())
def test_long_documents(document: str, tmp_path: object) -> None:
    text = long_documents()[document]
    ours = train_bpe(iter(TRAINING), vocab_size=600)
    ours.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        joined(ours, text, 5_000)
        == reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
    )
    count = len(list(ours.pieces(text, size=5_000)))
    assert count == 1 if document in ("one letter", "spaces", "emoji") else count > 15


def test_a_piece_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "LONGEST_CHARS", 1000)
    ours = train_bpe(iter(TRAINING), vocab_size=300)
    assert len(list(ours.pieces("word " * 1000, size=500))) == 10
    with pytest.raises(UserError, match="2,000 characters without a place where words certainly end"):
        list(ours.pieces("a" * 2000, size=500))
    whole = HuggingFaceTokenizer(bpe(*UNPROVEN["NFKC"]), eos_id=0)
    assert list(whole.pieces("a" * 1000)) == ["a" * 1000]
    with pytest.raises(UserError, match="2,000 characters, and this tokenizer must encode it as one text"):
        list(whole.pieces("a " * 1000))


def test_what_libraries_give_up_on_is_explained(ranks: dict[bytes, int]) -> None:
    """A run of white space overflows tiktoken's stack; a panic in Rust is no Exception."""
    tokenizer = TiktokenTokenizer(ranks, eos_id=len(ranks), pattern=cuts.CL100K)
    with pytest.raises(UserError, match=r"gave up on a document: .*stack size.* White space"):
        tokenizer.encode(" " * 1_100_000 + "a")

    class PanicException(BaseException):
        pass

    with pytest.raises(UserError, match="gave up on a document: retry limit"), cuts.explained_failures():
        raise PanicException("retry limit")
    with pytest.raises(KeyboardInterrupt), cuts.explained_failures():
        raise KeyboardInterrupt


def test_the_sequence_has_every_text() -> None:
    text = every_text("ab ", 3)
    assert {"".join(each) for each in itertools.product("ab ", repeat=3)} <= {
        (text + text)[i : i + 3] for i in range(len(text))
    }
