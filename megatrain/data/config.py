"""Config of the data: the source of the text, its tokenizer, and how tokens become samples."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, between, config


@config
class TokenizerConfig:
    kind: Literal["bpe", "bytes", "huggingface", "tiktoken"] = "bpe"
    """bpe: byte-level BPE trained on the data; bytes: one token a byte; huggingface and tiktoken read `path`."""
    path: str | None = None
    """huggingface: a directory with tokenizer.json, or that file; tiktoken: a file of base64 ranks."""
    vocab_size: int | Literal["auto"] = "auto"
    """bpe: tokens to train, special token included; auto: the model's vocab_size."""

    def problems(self) -> Iterator[Problem]:
        if self.kind == "bpe":
            yield from at_least(self, 257, "vocab_size")
        if self.kind in ("huggingface", "tiktoken") and not self.path:
            yield Problem("path", self.path, f"kind {self.kind} needs the path of a local file or directory")


@config
class DataConfig:
    kind: Literal["text", "synthetic"] = "text"
    """text: documents under `path`; synthetic: random tokens for benchmarks, nothing is read."""
    path: str | None = None
    """A file (.txt .md .py ..., .jsonl, .parquet), a directory of them, or a glob pattern. null: the source
    text of the Python standard library found on this machine."""
    text_field: str = "text"
    """Name of the JSONL key or Parquet column that holds the text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: float = 0.01
    """Fraction of the documents held out for validation, chosen by a hash of their text; 0: none."""
    mask_documents: bool = True
    """Mask attention across documents and restart positions at each document (packing without leakage)."""
    cache_dir: str | None = None
    """Directory of the token cache; null: $MEGATRAIN_CACHE, or ~/.cache/megatrain."""
    prefetch: int = 2
    """Global batches prepared ahead in the background; 0: none."""

    def problems(self) -> Iterator[Problem]:
        yield from between(self, 0.0, 0.5, "val_fraction")
        yield from at_least(self, 0, "prefetch")
        if self.path == "":
            yield Problem("path", "''", "must name a file, a directory or a pattern, or be null")
        if self.kind == "synthetic" and self.path is not None:
            yield Problem("path", self.path, "synthetic data reads no path; remove it, or use data=text")
