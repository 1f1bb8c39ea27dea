"""Speed of tokenizing and of the loader beside the plainest way to do the same, on one core; and long documents.

    RAYON_NUM_THREADS=1 python -m benchmarks.tokenizing --out benchmarks/results/tokenizing.json
    RAYON_NUM_THREADS=1 python -m benchmarks.tokenizing --long 10 100 --out benchmarks/results/long_documents.json

Tokenizing: documents of the Python standard library go through `Tokenizer.pieces` and `encode_batch`, as a
preparation does it, and through the library's own batch call (`encode_batch_fast` of tokenizers,
`encode_ordinary_batch` of tiktoken). The loader: the batches of a run, and as many windows at the same places of the
same file, read from a plain memory map into tensors of inputs and targets; a second ratio is to a peer that makes as
many tensors as the loader (with positions, and with document numbers where documents are separated). Ours and the
peer take turns; a ratio is the median of those of 15 pairs, in CPU time.

Long documents: one document of the given sizes (MB) is encoded in a process of its own by each kind of tokenizer, as
one text and in pieces. What takes more than the memory limit is recorded as such.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as tk
import torch

from benchmarks.machine import describe_machine
from megatrain.data import cuts
from megatrain.data.loader import Loader
from megatrain.data.store import TokenStore
from megatrain.data.tokenizer import HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer, train_bpe

CORPUS_CHARS = 4 << 20
REPEATS = 15
STEPS = 50
MEMORY_LIMIT_GB = 12


def documents() -> list[str]:
    """Return documents of the standard library, about 4 million characters."""
    found: list[str] = []
    chars = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if chars < CORPUS_CHARS and "-packages" not in str(file):
            with contextlib.suppress(UnicodeDecodeError):  # test data of the library
                found.append(file.read_text(encoding="utf-8"))
                chars += len(found[-1])
    return found


def as_tiktoken(trained: HuggingFaceTokenizer) -> TiktokenTokenizer:
    """Return tiktoken's form of a byte-level BPE, whose tokens are ranked in the order in which they were merged."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = trained._inner.get_vocab(with_added_tokens=False)
    del vocabulary[trained._inner.id_to_token(trained.eos_id)]
    ordered = sorted(vocabulary, key=lambda token: vocabulary[token])
    ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(ordered)}
    return TiktokenTokenizer(ranks, eos_id=len(ranks), pattern=cuts.OURS)


def compare(ours: Callable[[], object], peer: Callable[[], object]) -> dict[str, Any]:
    """Run both in turn; return the CPU seconds of each and the median of the pairs' ratios."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(REPEATS + 1):
        for name, call in (
            (("ours", ours), ("peer", peer)) if repeat % 2 else (("peer", peer), ("ours", ours))
        ):
            began = time.process_time()
            call()
            if repeat:  # the first fills caches
                times[name].append(time.process_time() - began)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "cpu_s": {name: [round(t, 4) for t in each] for name, each in times.items()},
        "speed_of_peer": round(statistics.median(b / a for a, b in zip(*times.values(), strict=True)), 3),
        "medians_s": {name: round(median, 5) for name, median in medians.items()},
    }


def tokenizing() -> dict[str, Any]:
    """Compare tokens per second with those of the libraries."""
    texts = documents()
    trained = train_bpe(iter(texts[::8]), vocab_size=4096)
    kinds: dict[str, tuple[Tokenizer, Callable[[], Any]]] = {
        "tokenizers": (
            trained,
            lambda: trained._inner.encode_batch_fast(texts, add_special_tokens=False),
        ),
    }
    other = as_tiktoken(trained)
    kinds["tiktoken"] = (other, lambda: other._inner.encode_ordinary_batch(texts, num_threads=1))
    found = {}
    for kind, (tokenizer, peer) in kinds.items():
        count = sum(len(ids) for ids in encoded(tokenizer, texts))
        row = compare(partial(encoded, tokenizer, texts), peer)
        found[kind] = {"tokens": count, "tokens_per_s": round(count / row["medians_s"]["ours"]), **row}
    return found


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Encode as a preparation does."""
    return tokenizer.encode_batch([piece for text in texts for piece in tokenizer.pieces(text)])


def loading() -> list[dict[str, Any]]:
    """Compare the loader with plain reads of the same windows."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    n_tokens = 50_000_000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens"
        generator.integers(0, 50_000, n_tokens, dtype=np.uint16).tofile(file)
        starts = np.unique(np.concatenate([[0], generator.integers(0, n_tokens, n_tokens // 600)]))
        tokens = np.memmap(file, dtype="<u2", mode="r")
        store = TokenStore(tokens, starts.astype(np.int64), "f", 0)
        for seq_len, batch in ((256, 8), (1024, 32), (4096, 16)):
            for mask_documents in (False, True):
                loader = Loader(store, seq_len, batch, batch, 1, mask_documents)
                order = [loader.step_batch(step).sample_ids * seq_len for step in range(STEPS)]
                ours = partial(_each, loader.step_batch, range(STEPS))
                row = compare(ours, partial(_each, partial(plain, tokens, seq_len), order))
                made = compare(ours, partial(_each, partial(as_many, tokens, seq_len, mask_documents), order))
                rows.append(
                    {
                        "seq_len": seq_len,
                        "batch": batch,
                        "mask_documents": mask_documents,
                        "tokens_per_s": round(STEPS * batch * seq_len / row["medians_s"]["ours"]),
                        **row,
                        "speed_of_peer_with_as_many_tensors": made["speed_of_peer"],
                    }
                )
    return rows


def _each(function: Callable[[Any], object], values: Iterable[Any]) -> None:
    for value in values:
        function(value)


def plain(tokens: np.ndarray, seq_len: int, starts: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Read inputs and targets as nanoGPT does (github.com/karpathy/nanoGPT, `get_batch`)."""
    x = torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
    return x, y


def as_many(
    tokens: np.ndarray, seq_len: int, mask_documents: bool, starts: np.ndarray
) -> tuple[torch.Tensor, ...]:
    """Read as `plain` does, and make the loader's other tensors without regard to documents."""
    positions = torch.arange(seq_len).repeat(len(starts), 1)
    doc_ids = (torch.zeros_like(positions),) if mask_documents else ()
    return *plain(tokens, seq_len, starts), positions, *doc_ids


# --- long documents ---


def sentencepiece_bpe(texts: list[str], *, splits: bool) -> HuggingFaceTokenizer:
    """Return BPE with SentencePiece's conventions; `splits`: into words first (Gemma 3), or not (Llama 2)."""
    inner = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    specials = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tk.trainers.BpeTrainer(vocab_size=4096, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(texts, trainer=trainer)
    if not splits:
        inner.normalizer = tk.normalizers.Sequence(
            [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        )
        inner.pre_tokenizer = None  # type: ignore[assignment]
    return HuggingFaceTokenizer(inner, eos_id=1)


def unigram(texts: list[str]) -> HuggingFaceTokenizer:
    """Return Unigram over SentencePiece's words, as T5 has it."""
    inner = tk.Tokenizer(tk.models.Unigram())
    inner.normalizer = tk.normalizers.NFKC()
    inner.pre_tokenizer = tk.pre_tokenizers.Metaspace()
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=4096, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(texts[:100], trainer=trainer)
    return HuggingFaceTokenizer(inner, eos_id=1)


def word_piece(texts: list[str]) -> HuggingFaceTokenizer:
    """Return WordPiece with BERT's normalizer and words."""
    inner = tk.Tokenizer(tk.models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = tk.normalizers.BertNormalizer()
    inner.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    trainer = tk.trainers.WordPieceTrainer(
        vocab_size=4096, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return HuggingFaceTokenizer(inner, eos_id=1)


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "bpe": lambda texts: train_bpe(iter(texts), vocab_size=4096),
    "tiktoken": lambda texts: as_tiktoken(train_bpe(iter(texts), vocab_size=4096)),
    "BPE on Metaspace words": partial(sentencepiece_bpe, splits=True),
    "BPE on the whole text": partial(sentencepiece_bpe, splits=False),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
TEXTS: dict[str, Callable[[list[str], int], str]] = {
    "source": lambda texts, chars: (
        (joined := "\n".join(texts)) * (chars // len(joined)) + joined[: chars % len(joined)]
    ),
    "one letter": lambda texts, chars: "a" * chars,
    "spaces": lambda texts, chars: " " * (chars - 1) + "a",
}


def long_document(kind: str, document: str, chars: int, *, in_pieces: bool) -> dict[str, Any]:
    """Encode one document in this process; return seconds, tokens, and memory beyond what making the text took."""
    limit = MEMORY_LIMIT_GB * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    texts = documents()
    tokenizer = KINDS[kind](texts[::40])
    text = TEXTS[document](texts, chars)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    tokens = 0
    for piece in tokenizer.pieces(text) if in_pieces else [text]:
        tokens += len(tokenizer.encode_batch([piece])[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": tokens,
        "cpu_s": round(time.process_time() - began, 1),
        "more_memory_gb": round((peak - before) * 1024 / 1e9, 2),
    }


def long_documents(megabytes: list[int], texts: list[str], timeout: float) -> Iterator[dict[str, Any]]:
    """Measure every kind, text and size in a process of its own."""
    for kind in KINDS:
        for document in texts:
            for in_pieces in (False, True):
                for size in megabytes:
                    if in_pieces and (kind not in ("bpe", "tiktoken") or document != "source"):
                        continue  # one piece: the same again
                    call = [sys.executable, "-m", "benchmarks.tokenizing", "--one", kind, document, str(size)]
                    row = {"kind": kind, "text": document, "mb": size, "in_pieces": in_pieces}
                    yield row | _result(call + ["--pieces"] * in_pieces, timeout)


def _result(call: list[str], timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "memory" in line), lines[-1])  # Rust's notes come after it
        return {"failed": said[:200]}
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--long", type=int, nargs="+", metavar="MB", help="long documents of these sizes instead"
    )
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=[*TEXTS], help="of which text they are")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one long document")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--pieces", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.one:
        kind, document, size = options.one
        print(json.dumps(long_document(kind, document, int(size) * 10**6, in_pieces=options.pieces)))
        return
    if os.environ.get("RAYON_NUM_THREADS") != "1":
        raise SystemExit("set RAYON_NUM_THREADS=1: the comparison is of one core")
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.tokenizing {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "tokenizers": tk.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }
    if options.long:
        result |= {"memory_limit_gb": MEMORY_LIMIT_GB, "documents": []}
        for row in long_documents(options.long, options.texts, options.timeout):
            print(json.dumps(row), flush=True)
            result["documents"].append(row)
            _write(result, options.out)
        return
    result |= {"tokenizing": tokenizing(), "loader": loading()}
    print(json.dumps(result, indent=1))
    _write(result, options.out)


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
