"""Saving and cold loading of a checkpoint against plain writing and reading of as many bytes.

    python -m benchmarks.checkpoint --dir DIR --out benchmarks/results/checkpoint_NAME.json

A save ends when every byte is hashed and on the disk; so does the plain write (one file, in one call, then fsync). A
load checks every hash; the plain read is one file into memory that is there already. Before each of the two the
files leave the page cache, so both come from the disk. Before each, the disk rests, and the rounds alternate which of
a pair goes first: a disk that has just taken a gigabyte serves the next one badly. Each ratio is the median of the
rounds' own.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer

TENSORS = 96  # as many as a model of a dozen layers has, with two moments each
STEP = 1
REST_S = 3.0


def make_state(size: int) -> dict[str, Tensor]:
    """Draw `TENSORS` float32 tensors of `size` bytes together; random, since some disks compress."""
    generator = torch.Generator().manual_seed(0)
    rows = size // 4 // 1024 // TENSORS
    return {f"tensor.{n}": torch.randn(rows, 1024, generator=generator) for n in range(TENSORS)}


def evict(directory: Path) -> None:
    """Drop the files below `directory`, which are synced, from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def plain_write(path: Path, data: memoryview) -> None:
    with path.open("xb", buffering=0) as file:
        written = 0
        while written < len(data):
            written += file.write(data[written:])
        os.fsync(file.fileno())


def plain_read(path: Path, into: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        read = 0
        while size := file.readinto(into[read:]):
            read += size


def one_round(
    directory: Path, state: dict[str, Tensor], plain: memoryview, *, plain_first: bool
) -> dict[str, float]:
    """Time each of the four actions, in seconds; `directory` is left empty."""
    path, checkpointer = directory / "plain", Checkpointer(directory / "checkpoints", CheckpointConfig())
    targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    actions: dict[str, Callable[[], object]] = {
        "plain write": lambda: plain_write(path, plain),
        "save": lambda: checkpointer.save(STEP, state, {}),
        "plain read": lambda: plain_read(path, plain),
        "load": lambda: checkpointer.load(targets),
    }
    times: dict[str, float] = {}
    for pair in (("plain write", "save"), ("plain read", "load")):
        evict(directory)
        for name in pair if plain_first else reversed(pair):
            time.sleep(REST_S)
            times[name] = seconds(actions[name])
    assert all(torch.equal(targets[name], tensor) for name, tensor in state.items())
    path.unlink()
    shutil.rmtree(checkpointer.directory)
    return times


def measure(directory: Path, *, size: int, rounds: int) -> dict[str, object]:
    """Return medians over `rounds`, after one that is not counted."""
    state = make_state(size)
    size = sum(tensor.nbytes for tensor in state.values())
    plain = memoryview(bytearray(torch.cat(list(state.values())).numpy().tobytes()))
    times = [one_round(directory, state, plain, plain_first=n % 2 == 0) for n in range(rounds + 1)][1:]
    names = ("plain write", "save", "plain read", "load")
    rate = {key: round(size / 1e9 / statistics.median(each[key] for each in times), 3) for key in names}
    return {
        "bytes": size,
        "gb_per_sec": rate,
        "ratio": {
            "save to plain write": round(statistics.median(t["plain write"] / t["save"] for t in times), 3),
            "load to plain read": round(statistics.median(t["plain read"] / t["load"] for t in times), 3),
        },
        "seconds": {key: [round(each[key], 3) for each in times] for key in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--size", type=float, default=1.0, help="GB of the state")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        result: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        result |= measure(Path(directory), size=round(options.size * 1e9), rounds=options.rounds)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
