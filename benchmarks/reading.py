"""How fast documents are read from files, beside the plain libraries and the package datasets (if installed).

    python -m benchmarks.reading --out benchmarks/results/reading.json

The same rows, the source of the Python standard library, as JSON lines, compressed JSON lines, CSV and Parquet. All
readers run in one process on one core in turn, `--rounds` times; megabytes are of UTF-8 text, times are of the CPU.
"""

import argparse
import csv
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import describe_machine
from megatrain.data.sources.corpus import find_corpus

LOADERS = {"a.jsonl": "json", "a.jsonl.gz": "json", "a.csv": "csv", "a.parquet": "parquet"}
"""The builder of the package datasets for each file."""


def write(texts: list[str], folder: Path) -> None:
    """Write the files."""
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 6))
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["id", "text"])
        table.writerows(enumerate(texts))
    pq.write_table(
        pa.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=200
    )


def plain(file: Path) -> Iterator[str]:
    """Yield the texts by the plain library of the format."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                yield from batch.column(0).to_pylist()
    elif file.suffix == ".csv":
        csv.field_size_limit(1 << 31)
        with open(file, newline="", encoding="utf-8") as stream:
            yield from (row["text"] for row in csv.DictReader(stream))
    else:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as raw:
            yield from (json.loads(line)["text"] for line in raw)


def by_datasets(file: Path) -> Iterator[str]:
    """Yield the texts as the package datasets streams them."""
    import datasets

    rows: Any = datasets.load_dataset(LOADERS[file.name], data_files=str(file), split="train", streaming=True)
    yield from (row["text"] for row in rows)


def ours(file: Path) -> Iterator[str]:
    """Yield the texts as a preparation reads them."""
    yield from (document.text for document in find_corpus(str(file)).documents())


def seconds(read: Callable[[Path], Iterable[str]], file: Path, size: int) -> float:
    """Return the CPU seconds of one reading; checks that nothing is missing."""
    began = time.process_time()
    found = sum(map(len, read(file)))
    if found != size:
        raise SystemExit(f"{read.__name__} read {found} of {size} characters of {file.name}")
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    texts = [document.text for document in find_corpus(None).documents()]
    size, megabytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts) / 1e6
    readers: list[Callable[[Path], Iterable[str]]] = [ours, plain]
    if find_spec("datasets"):
        readers.append(by_datasets)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.reading --rounds {options.rounds}",
        "machine": describe_machine(),
        "text_mb": round(megabytes, 1),
        "mb_per_cpu_second": {},
    }
    with tempfile.TemporaryDirectory() as name:
        write(texts, Path(name))
        for file in map(Path(name).joinpath, LOADERS):
            took = [[seconds(read, file, size) for read in readers] for _ in range(options.rounds)]
            speeds = {
                read.__name__: round(megabytes / statistics.median(each), 1)
                for read, each in zip(readers, zip(*took, strict=True), strict=True)
            }
            result["mb_per_cpu_second"][file.name] = speeds
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
