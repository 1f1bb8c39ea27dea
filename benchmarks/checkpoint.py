"""Saving and loading of a checkpoint against plain writing and reading, and training steps while one is written.

    python -m benchmarks.checkpoint --dir DIR --out benchmarks/results/checkpoint_NAME.json

A save ends when every byte is hashed and on the disk; so does the plain write of as many bytes (one file, in one call,
then fsync). A load checks every hash; the plain read is one file into memory that is there already. Before each of the
two the files leave the page cache, so both come from the disk. Before each, the disk rests. A disk that has just taken
a gigabyte serves the next one badly, so the rounds alternate which of a pair goes first; the medians of the two orders
are told apart, and the worse one counts. The same on a file system in memory shows what hashing costs where no disk is
waited for.

Memory is what the process holds at most beyond what it held before. Steps are forward and backward passes of a small
network, on one core less than there are and on all (or on the GPU): their time while an asynchronous save is written
over that without one. The load of the machine before and after is in the result: figures count only if nothing else
ran.
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
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.staging import Stager
from megatrain.checkpoint.store import Checkpointer
from megatrain.runtime.processes import Processes

TENSORS = 96  # as many as a model of a dozen layers has, with two moments each
STEP = 1
REST_S = 0.5
STEPS = 20  # without a save, before each
SAVES = 4  # beside which steps are timed, after one that is not


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


def peak_extra(action: Callable[[], object]) -> int:
    """Return how many bytes this process held at most during `action` beyond those before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def measure_place(
    directory: Path, state: dict[str, Tensor], plain: memoryview, rounds: int
) -> dict[str, object]:
    """Return rates and ratios on the file system of `directory`, after one round of each order that is not counted."""
    size = len(plain)
    times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for n in range(rounds + 1):
        for plain_first in (True, False):
            found = one_round(directory, state, plain, plain_first=plain_first)
            if n > 0:
                times[plain_first].append(found)
    ratios: dict[str, dict[str, float]] = {}
    for own, other in (("save", "plain write"), ("load", "plain read")):
        by_order = {
            f"{other if first else own} first": round(statistics.median(t[other] / t[own] for t in found), 3)
            for first, found in times.items()
        }
        ratios[f"{own} to {other}"] = by_order | {"worse": min(by_order.values())}
    both = times[True] + times[False]
    return {
        "gb_per_sec": {
            key: round(size / 1e9 / statistics.median(t[key] for t in both), 3) for key in both[0]
        },
        "ratio": ratios,
        "seconds": {key: [round(t[key], 3) for t in both] for key in both[0]},
    }


def measure_memory(directory: Path, state: dict[str, Tensor]) -> dict[str, float]:
    """Return the extra memory of a save, a load and a copied state, over the bytes of the state."""
    size = sum(tensor.nbytes for tensor in state.values())
    targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpointer, stager = Checkpointer(directory / "memory", CheckpointConfig()), Stager()
    found = {
        "save": peak_extra(lambda: checkpointer.save(STEP, state, {})),
        "load": peak_extra(lambda: checkpointer.load(targets)),
        "copy for an asynchronous save": peak_extra(lambda: stager.stage(state)),
    }
    shutil.rmtree(checkpointer.directory)
    return {key: round(extra / size, 3) for key, extra in found.items()}


def make_step(device: str) -> Callable[[], None]:
    """Return a forward and backward pass of some 50 ms on a core of 2020."""
    layers = [torch.nn.Linear(1024, 1024) for _ in range(8)]
    network, x = torch.nn.Sequential(*layers).to(device), torch.randn(128, 1024, device=device)

    def step() -> None:
        network(x).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure_steps(
    directory: Path, state: dict[str, Tensor], *, threads: int, device: str
) -> dict[str, float]:
    """Return the median step in seconds alone and beside asynchronous saves, their ratio, and the stall of a save."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step = make_step(device)
    cfg = CheckpointConfig(async_save=True, keep=1)
    saver = Saver(Checkpointer(directory / "steps", cfg), Processes())
    state = {name: tensor.to(device) for name, tensor in state.items()}
    alone: list[float] = []
    beside: list[float] = []
    stalls: list[float] = []
    for n in range(SAVES + 1):
        quiet = [seconds(step) for _ in range(STEPS)]
        stall = saver.save(n, lambda: state, {}, {}, is_last=False)
        busy: list[float] = []
        while not saver.reports():
            busy.append(seconds(step))
        if n > 0:  # the first one warms up, and makes the memory of the copy
            alone, beside, stalls = alone + quiet, beside + busy, [*stalls, stall]
    shutil.rmtree(directory / "steps")
    torch.set_num_threads(before)
    medians = statistics.median(alone), statistics.median(beside)
    return {
        "alone_s": round(medians[0], 4),
        "beside_s": round(medians[1], 4),
        "ratio": round(medians[1] / medians[0], 3),
        "stall_s": round(statistics.median(stalls), 3),
        "steps_beside": len(beside),
    }


def measure(directory: Path, in_memory: Path, *, size: int, rounds: int) -> dict[str, object]:
    """Return all measurements, with the load of the machine before and after them."""
    load = os.getloadavg()
    state = make_state(size)
    plain = memoryview(bytearray(torch.cat(list(state.values())).numpy().tobytes()))
    memory_used = measure_memory(directory, state)
    places = {
        name: measure_place(place, state, plain, rounds)
        for name, place in (("disk", directory), ("memory", in_memory))
    }
    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        steps = {"gpu": measure_steps(directory, state, threads=1, device="cuda")}
    else:
        steps = {
            f"{threads} of {cores} cores": measure_steps(directory, state, threads=threads, device="cpu")
            for threads in sorted({max(1, cores - 1), cores})
        }
    return {
        "load_before": [round(each, 2) for each in load],
        "load_after": [round(each, 2) for each in os.getloadavg()],
        "bytes": len(plain),
        "places": places,
        "extra_memory_to_state": memory_used,
        "steps_beside_asynchronous_save": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument(
        "--memory-dir", type=Path, default=Path("/dev/shm"), help="on a file system in memory"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--size", type=float, default=0.5, help="GB of the state")
    parser.add_argument("--rounds", type=int, default=3, help="of each order")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.dir) as directory,
        tempfile.TemporaryDirectory(dir=options.memory_dir) as in_memory,
    ):
        result: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        size = round(options.size * 1e9)
        result |= measure(Path(directory), Path(in_memory), size=size, rounds=options.rounds)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
