"""Tokenizers from files: those of the package `tokenizers`, tiktoken's ranks, and what this program saved."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.config.errors import UserError
from megatrain.data import cuts
from megatrain.data.config import TokenizerConfig
from megatrain.data.sources.chat import TEMPLATE_FILE, read_chat
from megatrain.data.tokenizer import (
    CONFIG_FILE,
    EOS,
    HF_FILE,
    META_FILE,
    RANKS_FILE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    PixelTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    tokenizers_package,
)

# Tried in this order in a Hugging Face tokenizer that does not name its end-of-text token.
KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")


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
    if meta["kind"] == "pixels":
        return PixelTokenizer()
    if meta["kind"] == "tiktoken":
        return _read_tiktoken(directory / RANKS_FILE, eos_id=meta["eos_id"])
    return HuggingFaceTokenizer(
        _load_json(directory / HF_FILE), eos_id=meta["eos_id"], described=_described(directory)
    )


def tokenizer_files(cfg: TokenizerConfig) -> list[Path]:
    """Return the files that `read_tokenizer(cfg)` may read, so that changes can be detected."""
    if not cfg.path or cfg.kind in ("bpe", "bytes"):
        return []
    path = Path(cfg.path)
    if path.is_file():
        return [path]
    names = (HF_FILE, CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json", "vocab.json", "merges.txt")
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
            return HuggingFaceTokenizer(inner, eos_id=eos_id, described=_described(directory))
    raise UserError(
        f"{path}: no end-of-text token. Looked for {', '.join(candidates)}; name it as eos_token in a "
        f"tokenizer_config.json beside {HF_FILE}"
    )


def _described(directory: Path) -> dict[str, Any]:
    """Return what a Hugging Face directory says of a tokenizer and is kept with it: chat template, special tokens.

    Raises:
        UserError: its files can't be read.
    """
    source, special = read_chat(directory)
    found: dict[str, Any] = {name: token for name, token in special.items() if token}
    return found if source is None else found | {"chat_template": source}


def _named_eos(directory: Path) -> str | None:
    """Return the `eos_token` that a Hugging Face directory names, if any."""
    for name in (CONFIG_FILE, "special_tokens_map.json"):
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
        return tokenizers_package().Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{file} is not a file of the package tokenizers: {error}") from None


def _load_vocab_and_merges(directory: Path) -> Any:
    """Read GPT-2's older format: byte-level BPE as two files."""
    tk = tokenizers_package()
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
