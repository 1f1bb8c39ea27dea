"""Data config: the source of the text, its tokenizer, and how tokens become samples."""

import codecs
from collections.abc import Iterator
from encodings import aliases
from typing import Annotated, Literal

from megatrain.config.nearest import nearest
from megatrain.config.paths import PathText
from megatrain.config.ranges import Range, Size
from megatrain.config.schema import Problem, config
from megatrain.data.clean.config import CleanStep, order_problems
from megatrain.data.template import template_parts

EXAMPLES = ("chat", "preferences", "classify", "images")
"""Kinds of data whose documents are examples, which are packed into samples as wholes."""


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


LABELLED = ("classify", "images")
"""Kinds of data whose documents have labels."""


@config
class ImagesConfig:
    height: Size = 8
    """Height of an image in pixels, as the model takes it."""
    width: Size = 8
    """Width of an image in pixels."""
    channels: Annotated[int, Range(at_least=1, at_most=3)] = 1
    """Bytes of a pixel: 1 for grey, 3 for red, green and blue."""
    resize: bool = True
    """Scale images of another size; false: leave them out, counted and named."""

    def problems(self) -> Iterator[Problem]:
        if self.channels == 2:
            yield Problem("channels", self.channels, "must be 1 or 3", (1, 3))


@config
class DataConfig:
    kind: Literal["text", "chat", "preferences", "classify", "images", "synthetic"] = "text"
    """Source of the tokens. text: the documents under `path`; chat: examples in the rows of files under `path`
    (conversations, instructions with outputs, prompts with completions), of which only the answers have a loss;
    preferences: pairs of a chosen and a rejected answer in such rows; classify: texts in such rows, with labels;
    images: PNG, JPEG and others, with their folders as labels, or scikit-learn's digits where there is no path;
    synthetic: random tokens, for benchmarks."""
    path: PathText | tuple[PathText, ...] | None = None
    """What to read: a file (text, JSON, JSONL, CSV, Parquet, Arrow, also compressed, tar, zip), a directory of such
    files, a glob pattern, a URL (s3://, hf://, ...), or a list of these; null: the source code of the Python standard
    library found on this machine."""
    text_field: str = "text"
    """Key or column that contains the text, or a conversation."""
    template: str | None = None
    """Text made from several fields, as in "{instruction}\\n{output}" (\\n: a line break); null: `text_field`. With
    kind=chat, the prompt."""
    answer: str | None = None
    """Template of the answer to the prompt that `template` makes, with kind=chat; null: the usual fields."""
    label_field: str = "label"
    """Key or column that contains the label of a text, or a list of its labels, with kind=classify."""
    images: ImagesConfig = ImagesConfig()
    encoding: str = "auto"
    """Encoding of text files, as Python names it (latin-1, cp1252, shift_jis, ...); auto: UTF-8, or what a byte-order
    mark says."""
    on_skip: Literal["warn", "error"] = "warn"
    """What to do when something under `path` is left out (not text, hidden, empty, null, a broken link, ...): warn says
    what and why; error refuses to go on."""
    workers: Annotated[int, Range(at_least=1, at_most=1024)] | Literal["auto"] = "auto"
    """Processes that read and tokenize; auto: one for small data, else one per core. The tokens are the same."""
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
    verify: Literal["background", "never"] = "background"
    """When a run compares the hashes of its token cache. background: while it trains, once on each machine, before it
    saves a checkpoint; never: only `megatrain data verify` does."""

    def problems(self) -> Iterator[Problem]:
        if self.path == "" or self.path == () or (isinstance(self.path, tuple) and "" in self.path):
            yield Problem("path", self.path, "must name a file, a directory or a pattern, or be null")
        if self.kind == "synthetic" and self.path is not None:
            yield Problem("path", self.path, "synthetic data reads no path; remove it, or use data=text")
        for name, template in (("template", self.template), ("answer", self.answer)):
            try:
                template_parts("{_}" if template is None else template)
            except ValueError as error:
                yield Problem(name, template, f"is no template: {error}")
        yield from self._example_problems()
        try:
            codec = codecs.lookup("utf-8" if self.encoding == "auto" else self.encoding)
        except (LookupError, ValueError):
            rule = "is no encoding that Python knows"
            yield Problem(
                "encoding", self.encoding, rule, nearest(self.encoding, set(aliases.aliases.values()))
            )
        else:
            if not codec._is_text_encoding:
                yield Problem("encoding", self.encoding, "is no encoding of text", ("auto",))
        if self.kind == "synthetic" and self.clean:
            yield Problem(
                "clean", self.clean, "synthetic data has no text to clean; remove it, or use data=text"
            )
        yield from order_problems(self.clean)

    def _example_problems(self) -> Iterator[Problem]:
        """Yield what examples need, and what only they can have."""
        if self.kind != "chat" and self.answer is not None:
            yield Problem("answer", self.answer, "only examples have answers: use data=chat", (None,))
        if self.kind not in EXAMPLES:
            return
        if self.kind == "preferences" and self.template is not None:
            yield Problem(
                "template", self.template, "is not for pairs of answers (data=preferences)", (None,)
            )
        if self.path is None and self.kind != "images":
            yield Problem("path", None, f"must name files with rows of examples (data={self.kind})")
        if self.kind == "chat" and (self.template is None) != (self.answer is None):
            missing = "template" if self.template is None else "answer"
            rule = "data.template makes the prompt and data.answer the answer: give both, or none"
            yield Problem(missing, None, rule)
        if self.clean:
            yield Problem("clean", self.clean, f"does not clean examples (data={self.kind}); remove it")
        if not self.mask_documents:
            yield Problem("mask_documents", False, "must be true for examples", (True,))
