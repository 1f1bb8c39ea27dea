"""datatrove's steps, and MinHash of datasketch and rensa; `benchmarks/cleaning.py` runs it with a Python that has them.

    python cleaning_peer.py TEXTS.json

TEXTS.json maps the name of a set of texts to a list. Each line of standard input is `STEP SET`; the answer is the CPU
seconds that the step takes over the set, and what it left, as one line of JSON. `steps` answers the names.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("datatrove", "datasketch", "rensa", "ftfy", "trafilatura", "spacy", "nltk")


def steps() -> dict[str, Callable[[list[str]], Any]]:
    """Return the peers' steps by our names; each takes all texts."""
    found: dict[str, Callable[[list[str]], Any]] = {}
    if _has("datatrove"):
        found |= _datatrove()
    if _has("datasketch"):
        found["minhash datasketch"] = _datasketch
    if _has("rensa"):
        found["minhash rensa"] = _rensa
    return found


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _datatrove() -> dict[str, Callable[[list[str]], Any]]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

    def by_filter(block: Any) -> Callable[[list[str]], Any]:
        def run(texts: list[str]) -> list[bool]:
            documents = [Document(text=text, id=str(n)) for n, text in enumerate(texts)]
            return [block.filter(document) is True for document in documents]

        return run

    def by_formatter(block: Any) -> Callable[[list[str]], Any]:
        return lambda texts: sum(block.format(text) != text for text in texts)

    return {
        "quality gopher": by_filter(GopherQualityFilter()),
        "quality c4": by_filter(C4QualityFilter(filter_no_terminal_punct=True)),
        "quality fineweb": by_filter(FineWebQualityFilter()),
        "repetition": by_filter(GopherRepetitionFilter()),
        "fix_text": by_formatter(FTFYFormatter()),
        "pii": by_formatter(PIIFormatter()),
    }


def _shingles(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[at : at + 5]) for at in range(max(1, len(words) - 4))]


def _datasketch(texts: list[str]) -> None:
    from datasketch import MinHash

    for text in texts:
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in _shingles(text)])


def _rensa(texts: list[str]) -> None:
    from rensa import RMinHash

    for text in texts:
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update(_shingles(text))
        sketch.digest()


def main() -> None:
    """Answer the lines of standard input."""
    sets = json.loads(Path(sys.argv[1]).read_text())
    known = steps()
    for line in sys.stdin:
        name, _, chosen = line.rstrip("\n").rpartition("\t")
        if not name:
            packages = {package: version(package) for package in PACKAGES if _has(package)}
            print(json.dumps({"steps": list(known), "packages": packages}), flush=True)
            continue
        started = time.process_time()
        left = known[name](sets[chosen])
        print(json.dumps({"seconds": time.process_time() - started, "left": left}), flush=True)


if __name__ == "__main__":
    main()
