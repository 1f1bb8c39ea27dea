"""Data config: the source of the text, its tokenizer, and how tokens become samples."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.paths import PathText
from megatrain.config.ranges import Range, Size
from megatrain.config.schema import Problem, config
from megatrain.data.clean.config import CleanStep, order_problems


@config
class TokenizerConfig:
    kind: Literal["bpe", "bytes", "huggingface", "tiktoken"] = "bpe"
    """Tokenizer. bpe: byte-level BPE trained on the data; bytes: one token per byte; huggingface and tiktoken: read
    from `path`."""
    path: PathText | None = None
    """Tokenizer files. huggingface: tokenizer.json or a directory that contains it; tiktoken: a file of base64 ranks.
    null for the other kinds."""
    vocab_size: Size | Literal["auto"] = "auto"
    """Vocabulary size of a bpe tokenizer in tokens, including the special token; auto: the model's vocab_size."""

    def problems(self) -> Iterator[Problem]:
        if self.kind == "bpe" and self.vocab_size != "auto" and self.vocab_size < 257:
            yield Problem("vocab_size", self.vocab_size, "must be at least 257", (257,))
        if self.kind in ("huggingface", "tiktoken") and not self.path:
            yield Problem("path", self.path, f"kind={self.kind} needs the path of a local file or directory")


@config
class DataConfig:
    kind: Literal["text", "synthetic"] = "text"
    """Source of the tokens. text: the documents under `path`; synthetic: random tokens, for benchmarks."""
    path: PathText | None = None
    """A file (.txt .md .py ..., .jsonl, .parquet), a directory of such files, or a glob pattern; null: the source code
    of the Python standard library found on this machine."""
    text_field: str = "text"
    """JSONL key or Parquet column that contains the text."""
    clean: tuple[CleanStep, ...] = ()
    """Cleaning steps, in the order in which they are applied to each document; [] leaves the text as it is."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: Annotated[float, Range(at_least=0, at_most=0.5)] = 0.01
    """Fraction of the documents held out for validation, chosen by a hash of their text; 0: none."""
    mask_documents: bool = True
    """Mask attention across document boundaries and restart positions at each document (packing without leakage)."""
    cache_dir: PathText | None = None
    """Directory of the token cache; null: $MEGATRAIN_CACHE, or ~/.cache/megatrain."""
    prefetch: Annotated[int, Range(at_least=0, at_most=1024)] = 2
    """Number of global batches to prepare ahead in the background; 0: none."""

    def problems(self) -> Iterator[Problem]:
        if self.path == "":
            yield Problem("path", "''", "must name a file, a directory or a pattern, or be null")
        if self.kind == "synthetic" and self.path is not None:
            yield Problem("path", self.path, "synthetic data reads no path; remove it, or use data=text")
        if self.kind == "synthetic" and self.clean:
            yield Problem(
                "clean", self.clean, "synthetic data has no text to clean; remove it, or use data=text"
            )
        yield from order_problems(self.clean)
