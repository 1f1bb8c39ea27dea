"""Tokenizers: lossless conversion between text and ids, and the number of bytes of text per id.

Four kinds behind one interface: bytes (needs nothing), BPE trained here and Hugging Face's (package
`tokenizers`), and tiktoken's rank files (package `tiktoken`). Special tokens are only inserted by the program: a
text that happens to spell one, such as `<|endoftext|>`, is encoded as ordinary text.

A long document is encoded in pieces where that provably gives the same tokens (`cuts.py`), and as one text elsewhere.
"""

import base64
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data import cuts
from megatrain.data.plain import BYTE, PlainText
from megatrain.runtime.packages import how_to_install

EOS = "<|endoftext|>"
META_FILE = "meta.json"
HF_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
RANKS_FILE = "ranks.tiktoken"


class Tokenizer(ABC):
    """Interface of all tokenizers. Ids lie in [0, vocab_size), and `eos_id` ends a document."""

    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids `(tokens,)` uint32, without special tokens, on all cores."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text. Special and unknown ids are dropped, incomplete UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of text per token id, `(vocab_size,)` int64; 0 for special tokens.

        Their sum over the ids of a text is the text's length in bytes, for every tokenizer without a lossy normalizer;
        so bits per byte is exact.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` reads into `directory`, which is created if missing."""

    @abstractmethod
    def digest(self) -> str:
        """Return a digest of what each id means (not of the rules that split text into ids)."""

    @abstractmethod
    def pieces(self, text: str, *, size: int = cuts.PIECE_CHARS) -> Iterator[str]:
        """Yield `text` in pieces of about `size` characters whose tokens, joined, are exactly those of the whole text.

        It is longer where no cut is proven (`cuts.py`): in a very long word, or throughout for some tokenizers.

        Raises:
            UserError: a piece is too long to be encoded in a bounded amount of memory (`LONGEST_CHARS`).
        """

    def encode_markup(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text as `encode_batch` does, but for special tokens that it spells, which become their ids."""
        return self.encode_batch(texts)

    @abstractmethod
    def encode_places(
        self, texts: Sequence[str], *, markup: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode each text as `encode_batch` does, or with `markup` as `encode_markup`, and say where tokens stand.

        Returns ids `(tokens,)` uint32, and `(tokens, 2)` int64: a token's first character, and the one after its last.
        Tokens that share a character all have it; one that stands for no character is empty.
        """

    def encode(self, text: str) -> list[int]:
        """Encode `text` to a list of ids, without special tokens."""
        return self.encode_batch([text])[0].tolist()


class ByteTokenizer(Tokenizer):
    """A tokenizer of UTF-8 bytes: ids 0 to 255; 256 ends a document."""

    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def encode_places(
        self, texts: Sequence[str], *, markup: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        found = self.encode_batch(texts)
        return [(ids, _places(text, np.ones_like(ids))) for text, ids in zip(texts, found, strict=True)]

    def pieces(self, text: str, *, size: int = cuts.PIECE_CHARS) -> Iterator[str]:
        yield from (text[start : start + size] for start in range(0, len(text) or 1, size))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def save(self, directory: Path) -> None:
        _write_meta(directory, kind="bytes", eos_id=self.eos_id)

    def digest(self) -> str:
        return _digest("bytes")


class PixelTokenizer(ByteTokenizer):
    """A tokenizer of images, whose texts have a character for each byte: ids 0 to 255; 256 ends an image."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("latin-1"), dtype=np.uint8).astype(np.uint32) for text in texts]

    def encode_places(
        self, texts: Sequence[str], *, markup: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        places = [np.arange(len(text)) for text in texts]
        return [
            (ids, np.stack([n, n + 1], 1)) for ids, n in zip(self.encode_batch(texts), places, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("latin-1")

    def save(self, directory: Path) -> None:
        _write_meta(directory, kind="pixels", eos_id=self.eos_id)

    def digest(self) -> str:
        return _digest("pixels")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`: trained here, or read from a file `tokenizer.json`."""

    def __init__(self, inner: Any, *, eos_id: int, described: Mapping[str, Any] | None = None) -> None:
        """Take a tokenizer of the package.

        Args:
            described: entries of a tokenizer_config.json to keep: the chat template and the names of special tokens.
        """
        self.described = dict(described or {})
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.eos_id = eos_id
        self._tokens = {i: t for t, i in inner.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._tokens) + 1
        self._plain = PlainText(inner, eos_id=eos_id, vocab_size=self.vocab_size)
        self._rule = cuts.cut_rule(inner)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with cuts.explained_failures():
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [np.frombuffer(array("I", e.ids), dtype=np.uint32) for e in encodings]
            return [self._plain.checked(text, ids) for text, ids in zip(texts, found, strict=True)]

    def encode_markup(self, texts: Sequence[str]) -> list[np.ndarray]:
        with cuts.explained_failures():
            marked = type(self._inner).from_str(self._inner.to_str())
            marked.encode_special_tokens = False
            encodings = marked.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_places(
        self, texts: Sequence[str], *, markup: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        state = json.loads(self._inner.to_str())
        state["post_processor"] = (
            None  # with no special tokens to add it would only take spaces off the places
        )
        with cuts.explained_failures():
            placing = type(self._inner).from_str(json.dumps(state))
            placing.encode_special_tokens = not markup
            found = []
            for text, encoding in zip(
                texts, placing.encode_batch(list(texts), add_special_tokens=False), strict=True
            ):
                ids = np.array(encoding.ids, dtype=np.uint32)
                if not markup and (plain := self._plain.checked(text, ids)) is not ids:
                    ids, encoding = plain, self._plain.encoding(text)
                found.append((ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)))
            return found

    def pieces(self, text: str, *, size: int = cuts.PIECE_CHARS) -> Iterator[str]:
        return cuts.cut(text, self._rule, size)

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode([i for i in ids if i in self._tokens], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        decoders = _decoder_types(json.loads(self._inner.to_str()).get("decoder"))
        added = self._inner.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for i, token in self._tokens.items():
            if i in added:
                sizes[i] = 0 if added[i].special or i == self.eos_id else len(added[i].content.encode())
            elif "ByteLevel" in decoders:
                sizes[i] = len(token)  # in this alphabet a character is a byte
            elif "ByteFallback" in decoders and BYTE.fullmatch(token):
                sizes[i] = 1
            elif decoders & {"Metaspace", "Replace"}:
                sizes[i] = len(token.replace("\u2581", " ").encode())
            else:
                sizes[i] = len(self._inner.decode([i]).encode())
        sizes[self.eos_id] = 0
        return sizes

    def save(self, directory: Path) -> None:
        _write_meta(directory, kind="huggingface", eos_id=self.eos_id)
        self.save_pretrained(directory)

    def save_pretrained(self, directory: Path) -> None:
        """Write the two files from which transformers loads a tokenizer."""
        self._inner.save(str(directory / HF_FILE), pretty=False)
        eos = self._tokens[self.eos_id]
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **self.described, "eos_token": eos}
        (directory / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")

    def description(self) -> str:
        """Return the content of its `tokenizer.json`."""
        text: str = self._inner.to_str()
        return text

    def digest(self) -> str:
        return _digest("huggingface", self.eos_id, sorted(self._tokens.items()))


class TiktokenTokenizer(Tokenizer):
    """A tiktoken vocabulary. `ranks` maps a token's bytes to its id; one special token ends a document."""

    def __init__(self, ranks: dict[bytes, int], *, eos_id: int, pattern: str) -> None:
        import tiktoken

        self._ranks = ranks
        self._bytes = {i: token for token, i in ranks.items()}
        self._inner = tiktoken.Encoding(
            "local", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS: eos_id}
        )
        self.eos_id = eos_id
        self.vocab_size = max(eos_id, max(self._bytes)) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = partial(self._inner.encode_to_numpy, disallowed_special=())
        with cuts.explained_failures(), ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(encode, texts))

    def encode_places(
        self, texts: Sequence[str], *, markup: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        sizes, found = self.token_bytes(), self.encode_batch(texts)
        return [(ids, _places(text, sizes[ids])) for text, ids in zip(texts, found, strict=True)]

    def pieces(self, text: str, *, size: int = cuts.PIECE_CHARS) -> Iterator[str]:
        return cuts.cut(text, cuts.BETWEEN_WORDS, size)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for i, token in self._bytes.items():
            sizes[i] = len(token)
        return sizes

    def save(self, directory: Path) -> None:
        _write_meta(directory, kind="tiktoken", eos_id=self.eos_id)
        lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in sorted(self._bytes.items()))
        (directory / RANKS_FILE).write_bytes(b"".join(lines))

    def digest(self) -> str:
        return _digest(
            "tiktoken", self.eos_id, [(i, token.hex()) for i, token in sorted(self._bytes.items())]
        )


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> HuggingFaceTokenizer:
    """Train byte-level BPE of `vocab_size` tokens (fewer on little text); the same texts give the same tokenizer."""
    tk = tokenizers_package()
    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [
            tk.pre_tokenizers.Split(tk.Regex(cuts.OURS), behavior="isolated"),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return HuggingFaceTokenizer(inner, eos_id=inner.token_to_id(EOS))


def _places(text: str, sizes: np.ndarray) -> np.ndarray:
    """Return the places of the tokens of `text`, as `Tokenizer.encode_places` does, from their `sizes` in bytes."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    character_of = np.repeat(np.arange(len(points)), widths)
    ends = np.cumsum(sizes.astype(np.int64))
    return np.stack([character_of[ends - sizes.astype(np.int64)], character_of[ends - 1] + 1], axis=1)


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(d) for d in decoder.get("decoders", ())))


def _write_meta(directory: Path, *, kind: str, eos_id: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / META_FILE).write_text(json.dumps({"kind": kind, "eos_id": eos_id}), encoding="utf-8")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenizers_package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"this tokenizer needs the package tokenizers: {how_to_install('tokenizers')}"
        ) from None
    return tokenizers
