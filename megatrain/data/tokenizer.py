"""Tokenizers: lossless conversion between text and ids, and the number of bytes of text per id.

Four kinds behind one interface: bytes (needs nothing), BPE trained here and Hugging Face's (package
`tokenizers`), and tiktoken's rank files (package `tiktoken`). Special tokens are only inserted by the program: a
text that happens to spell one, such as `<|endoftext|>`, is encoded as ordinary text.

A long document is encoded in pieces where that provably gives the same tokens (`cuts.py`), and as one text elsewhere.
"""

import base64
import binascii
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data import cuts
from megatrain.data.config import TokenizerConfig
from megatrain.data.plain import BYTE, PlainText
from megatrain.runtime.packages import how_to_install

EOS = "<|endoftext|>"
META_FILE = "meta.json"
HF_FILE = "tokenizer.json"
RANKS_FILE = "ranks.tiktoken"

# Tried in this order in a Hugging Face tokenizer that does not name its end-of-text token.
KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")


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

    def encode(self, text: str) -> list[int]:
        """Encode `text` to a list of ids, without special tokens."""
        return self.encode_batch([text])[0].tolist()


class ByteTokenizer(Tokenizer):
    """A tokenizer of UTF-8 bytes: ids 0 to 255; 256 ends a document."""

    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`: trained here, or read from a file `tokenizer.json`."""

    def __init__(self, inner: Any, *, eos_id: int) -> None:
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
        self._inner.save(str(directory / HF_FILE), pretty=False)

    def save_pretrained(self, directory: Path) -> None:
        """Write the two files from which transformers loads a tokenizer."""
        self._inner.save(str(directory / HF_FILE), pretty=False)
        eos = self._tokens[self.eos_id]
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")

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
    tk = _tokenizers()
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


def read_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that `cfg` names, of any kind that needs no training (all but `bpe`).

    Raises:
        UserError: the file is missing or unusable.
    """
    if cfg.kind == "bytes":
        return ByteTokenizer()
    path = Path(cfg.path or "")
    if not path.exists():
        raise UserError(f"data.tokenizer.path={cfg.path}: there is no such file or directory")
    try:
        return _read_tiktoken(path) if cfg.kind == "tiktoken" else _read_huggingface(path)
    except OSError as error:
        raise UserError(f"data.tokenizer.path={cfg.path}: {error.strerror or error}") from None


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read back what `Tokenizer.save` wrote.

    Raises:
        UserError: `directory` contains no tokenizer.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} contains no tokenizer ({META_FILE}: {error})") from None
    if meta["kind"] == "bytes":
        return ByteTokenizer()
    if meta["kind"] == "tiktoken":
        return _read_tiktoken(directory / RANKS_FILE, eos_id=meta["eos_id"])
    return HuggingFaceTokenizer(_load_json(directory / HF_FILE), eos_id=meta["eos_id"])


def tokenizer_files(cfg: TokenizerConfig) -> list[Path]:
    """Return the files that `read_tokenizer(cfg)` may read, so that changes can be detected."""
    if not cfg.path or cfg.kind in ("bpe", "bytes"):
        return []
    path = Path(cfg.path)
    if path.is_file():
        return [path]
    names = (HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    return [path / name for name in names if (path / name).is_file()]


def _read_huggingface(path: Path) -> HuggingFaceTokenizer:
    directory = path if path.is_dir() else path.parent
    if path.is_file():
        inner = _load_json(path)
    elif (path / HF_FILE).is_file():
        inner = _load_json(path / HF_FILE)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        inner = _load_vocab_and_merges(path)
    else:
        raise UserError(
            f"{path} has neither {HF_FILE} nor vocab.json with merges.txt. Create the former with "
            f"transformers: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(...)"
        )
    named = _named_eos(directory)
    candidates = KNOWN_EOS if named is None else (named,)
    for token in candidates:
        eos_id = inner.token_to_id(token)
        if eos_id is not None:
            return HuggingFaceTokenizer(inner, eos_id=eos_id)
    raise UserError(
        f"{path}: no end-of-text token. Looked for {', '.join(candidates)}; name it as eos_token in a "
        f"tokenizer_config.json beside {HF_FILE}"
    )


def _named_eos(directory: Path) -> str | None:
    """Return the `eos_token` that a Hugging Face directory names, if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not a JSON object: {error}") from None
        if token:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise UserError(f"{file}: eos_token is neither a text nor an object whose `content` is one")
            return text
    return None


def _load_json(file: Path) -> Any:
    try:
        return _tokenizers().Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{file} is not a file of the package tokenizers: {error}") from None


def _load_vocab_and_merges(directory: Path) -> Any:
    """Read GPT-2's older format: byte-level BPE as two files."""
    tk = _tokenizers()
    try:
        model = tk.models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{directory}: vocab.json and merges.txt are not a BPE model: {error}") from None
    inner = tk.Tokenizer(model)
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tk.decoders.ByteLevel()
    if inner.token_to_id(EOS) is not None:
        inner.add_special_tokens([EOS])
    return inner


class _Published(NamedTuple):
    """Split pattern and end-of-text id of a published rank file, which does not contain them."""

    pattern: str
    eos_id: int


# By the number of ranks: GPT-2, GPT-4 (cl100k), Llama 3, Qwen, GPT-4o (o200k).
_PUBLISHED = {
    50256: _Published(cuts.GPT2, 50256),
    100256: _Published(cuts.CL100K, 100257),
    128000: _Published(cuts.CL100K, 128001),
    151643: _Published(cuts.QWEN, 151643),
    199998: _Published(cuts.O200K, 199999),
}


def _read_tiktoken(path: Path, *, eos_id: int | None = None) -> TiktokenTokenizer:
    """Read lines of `base64(token) rank`; the number of ranks determines the pattern and the end-of-text id."""
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{path}:{number} is not a line 'base64 rank' of a tiktoken file") from None
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing:
        raise UserError(f"{path} lacks {missing} of the 256 single bytes, so some text could not be encoded")
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{path} assigns one rank to several tokens")
    known = _PUBLISHED.get(len(ranks), _Published(cuts.CL100K, max(ranks.values()) + 1))
    return TiktokenTokenizer(ranks, eos_id=known.eos_id if eos_id is None else eos_id, pattern=known.pattern)


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(d) for d in decoder.get("decoders", ())))


def _write_meta(directory: Path, *, kind: str, eos_id: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / META_FILE).write_text(json.dumps({"kind": kind, "eos_id": eos_id}), encoding="utf-8")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"this tokenizer needs the package tokenizers: {how_to_install('tokenizers')}"
        ) from None
    return tokenizers
