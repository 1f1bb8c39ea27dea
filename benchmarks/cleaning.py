"""Speed of the steps of `data.clean` on one core, beside datatrove's on the same texts.

    python -m benchmarks.cleaning --peer PYTHON --out benchmarks/results/cleaning.json

PYTHON is an interpreter that has datatrove, datasketch or rensa; without it only our own steps are measured. The texts
are manual pages (section 1, without most of their markup) and the HTML pages below /usr/share/doc. Rounds of ours and
theirs take turns; figures are medians of CPU seconds. Steps of one name are not the same in all: datatrove splits words
with spaCy where ours splits at white space, and its personal data are e-mail and IP addresses only.
"""

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from megatrain.config.load import load
from megatrain.data.clean.config import CleanStep
from megatrain.data.clean.duplicates import find_duplicates
from megatrain.data.clean.steps import Cleaner
from megatrain.data.config import DataConfig

MANUALS, PAGES = Path("/usr/share/man/man1"), Path("/usr/share/doc")
STEPS: dict[str, Any] = {
    "fix_text": "fix_text",
    "normalize": "normalize",
    "html": "html",
    "language": {"kind": "language", "keep": ["en"]},
    "quality gopher": {"kind": "quality", "rules": "gopher"},
    "quality c4": {"kind": "quality", "rules": "c4"},
    "quality fineweb": {"kind": "quality", "rules": "fineweb"},
    "repetition": "repetition",
    "pii": "pii",
    "text8": "text8",
    "decontaminate": {"kind": "decontaminate", "against": []},
}
FINGERPRINTS = {"exact_duplicates": "exact_duplicates", "minhash": "near_duplicates"}
TOGETHER = ("fix_text", "language", "repetition", "quality gopher", "quality c4", "quality fineweb", "pii")
"""FineWeb's steps in its order."""
LARGE = 20 << 20
ROFF = re.compile(
    r"^[.'](?:TH|SH|\\\"|de|ie|el|ds|tr|nr|if|hy|ad|nh).*\n|^[.']\S*[ \t]?|\\f.|\\&|\\", re.MULTILINE
)
"""Requests and escapes of manual pages."""
THOROUGH: dict[str, Any] = {
    "quality gopher": {"kind": "quality", "rules": {"kind": "gopher", "max_words": 10**9}},
    "quality c4": {"kind": "quality", "rules": {"kind": "c4", "curly_brackets": False, "lorem_ipsum": False}},
    "repetition": {
        "kind": "repetition",
        **dict.fromkeys(("duplicate_lines", "duplicate_paragraphs"), 1),
        **dict.fromkeys(("duplicate_line_characters", "duplicate_paragraph_characters"), 1),
        "top_ngrams": [1] * 3,
        "duplicate_ngrams": [1] * 6,
    },
}
"""Steps as they are for one large document, so that they look at all of it before they decide."""
PEER = Path(__file__).with_name("cleaning_peer.py")


def manuals(limit: int) -> list[str]:
    """Return manual pages of about `limit` bytes in all, spread over the alphabet."""
    files = sorted(MANUALS.glob("*.gz"))
    texts, size = [], 0
    for stride in (17, 1):
        for path in files[::stride]:
            if size >= limit:
                return texts
            text = ROFF.sub("", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            texts.append(text)
            size += len(text.encode())
    return texts


def pages(limit: int) -> list[str]:
    """Return HTML pages of about `limit` bytes in all."""
    texts, size = [], 0
    for path in filter(Path.is_file, sorted(PAGES.rglob("*.html"))):
        if size >= limit:
            break
        texts.append(path.read_text("utf-8", "replace"))
        size += path.stat().st_size
    return texts


def made(name: str, benchmark: Path) -> tuple[CleanStep, ...]:
    """Return one of our steps, or all that run together."""
    if name == "together":
        return tuple(step for each in TOGETHER for step in made(each, benchmark))
    described = STEPS.get(name) or FINGERPRINTS[name]
    if name == "decontaminate":
        described = {**described, "against": [str(benchmark)]}
    return load(DataConfig, {"clean": [described]}).clean


def seconds(name: str, cleaner: Cleaner, texts: list[str]) -> tuple[float, list[bool]]:
    """Return the CPU seconds of one of our steps over `texts`, and which of them it keeps."""
    started = time.process_time()
    if name in FINGERPRINTS:
        kept = [bool(cleaner.fingerprint(text)) for text in texts]
    else:
        kept = [cleaner.clean(text).text is not None for text in texts]
    return time.process_time() - started, kept


class Peer:
    """A process with the peers' packages; it is idle unless it is asked."""

    def __init__(self, python: str, sets: dict[str, list[str]], folder: Path) -> None:
        (folder / "texts.json").write_text(json.dumps(sets))
        command = [python, str(PEER), str(folder / "texts.json")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> dict[str, Any]:
        """Return the answer to one line."""
        assert self.process.stdin
        assert self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def scaling(benchmark: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each step's CPU seconds for a document of 5 MiB and for one of 20 MiB."""
    text = "\n".join(manuals(LARGE + (1 << 20)))
    for name in (*STEPS, *FINGERPRINTS):
        if name == "html":  # it removes so large a page unread
            continue
        given = (
            load(DataConfig, {"clean": [THOROUGH[name]]}).clean if name in THOROUGH else made(name, benchmark)
        )
        cleaner = Cleaner(given)
        times = []
        for size in (LARGE // 4, LARGE):
            times.append(round(seconds(name, cleaner, [text[:size]])[0], 2))
        yield name, {"5_MiB_s": times[0], "20_MiB_s": times[1]}
        print(f"{name}: 5 MiB {times[0]} s, 20 MiB {times[1]} s", flush=True)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    sets = {"manuals": manuals(options.megabytes * 10**6), "pages": pages(options.megabytes * 10**6 // 4)}
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in sets.items()}
    benchmark = folder / "benchmark.txt"
    benchmark.write_text(" ".join(f"word{n}" for n in range(200_000)))
    peer = Peer(options.peer, sets, folder) if options.peer else None
    about = peer.ask("\tabout") if peer else {"steps": [], "packages": {}}
    names = (*STEPS, *FINGERPRINTS, "together")
    cleaners = {name: Cleaner(made(name, benchmark)) for name in names}
    ours: dict[str, list[float]] = {name: [] for name in names}
    theirs: dict[str, list[float]] = {name: [] for name in about["steps"]}
    agreement: dict[str, str] = {}
    for _ in range(options.rounds):
        for name in names:
            chosen = "pages" if name == "html" else "manuals"
            taken, kept = seconds(name, cleaners[name], sets[chosen])
            ours[name].append(taken)
            for other in theirs:
                if peer and (other == name or (name == "minhash" and other.startswith("minhash"))):
                    answer = peer.ask(f"{other}\t{chosen}")
                    theirs[other].append(answer["seconds"])
                    if isinstance(answer["left"], list):
                        same = sum(a == b for a, b in zip(kept, answer["left"], strict=True))
                        agreement[other] = f"{same} of {len(kept)}"
    if peer:
        peer.close()

    def speed(taken: list[float], name: str) -> dict[str, float]:
        chosen = "pages" if name == "html" else "manuals"
        median = statistics.median(taken)
        return {
            "MB_per_s": round(sizes[chosen] / median / 1e6, 2),
            "documents_per_s": round(len(sets[chosen]) / median, 1),
            "seconds": [round(each, 3) for each in taken],
        }

    return {
        "texts": {name: {"documents": len(sets[name]), "bytes": sizes[name]} for name in sets},
        "ours": {name: speed(taken, name) for name, taken in ours.items()},
        "theirs": {name: speed(taken, name) for name, taken in theirs.items()},
        "same_decision": agreement,
        "same_decision_note": "spaCy's words include punctuation marks, so that datatrove's Gopher rule on letters "
        "removes most manual pages; its other defaults differ from the papers' thresholds, too. "
        "Where words and thresholds are the same: tests/unit/data/clean/test_against_datatrove.py.",
        "peer_packages": about["packages"],
        "find_duplicates": comparison(options.documents),
        "one_document": dict(scaling(benchmark)),
    }


def comparison(documents: int) -> dict[str, float]:
    """Return the CPU seconds that it takes to compare fingerprints of random documents, a tenth of them copies."""
    steps = load(DataConfig, {"clean": ["exact_duplicates", "near_duplicates"]}).clean
    width = len(Cleaner(steps).fingerprint("x"))
    table = np.random.default_rng(0).integers(0, 256, (documents, width), dtype=np.uint8)
    table[::10, 16:] = table[1::10, 16:]  # equal signatures, different digests
    started = time.process_time()
    removed = find_duplicates(table, steps)
    return {
        "documents": documents,
        "removed": len(removed.documents),
        "seconds": round(time.process_time() - started, 2),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--peer", help="a Python that has datatrove")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=4)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    packages = {
        package: version(package) for package in ("ftfy", "trafilatura", "py3langid", "rensa", "numpy")
    }
    result = {
        "command": " ".join(["python -m benchmarks.cleaning", *sys.argv[1:]]).replace(
            str(options.peer), "PYTHON"
        ),
        "machine": describe_machine(),
        "load_average": round(load_before, 2),
        "packages": packages,
        **found,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
