"""Uploads to a durable tier against plain copies of the files, steps beside them, and a copy in a neighbour's memory.

    python -m benchmarks.tier --url s3://bucket/place --out benchmarks/results/tier_NAME.json

An upload reads each file of a checkpoint, hashes it while it is sent, looks at the sizes and puts the manifest last;
a fetch checks every hash and syncs to disk. The plain ones are fsspec's own `put` and `get` of the directory. The
rounds alternate which goes first. An object store is found through the environment, as s3fs does it.

The neighbour is another process, to which gloo sends the bytes that were just written to memory: what a copy in the
memory of another node costs besides the network. The same bytes go to the disk, synced, for comparison.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.checkpoint import make_state, make_step, seconds
from benchmarks.machine import describe_machine
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.checkpoint.tier import Tier
from megatrain.checkpoint.uploads import Uploader
from megatrain.runtime.urls import open_file_system

STEP = 1
QUIET_STEPS = 60
PIECE = 16 << 20  # bytes that gloo sends at a time


def free() -> None:
    """Ask nobody: there is one process."""


def one_round(source: Path, url: str, folder: Path, *, plain_first: bool) -> dict[str, float]:
    """Time each of the four copies, in seconds; what they wrote at `url` is removed."""
    tier = Tier(f"{url}/{uuid.uuid4().hex}")
    store, place = open_file_system(f"{url}/{uuid.uuid4().hex}")
    store.makedirs(place, exist_ok=True)
    actions: list[tuple[str, Callable[[], object]]] = [
        ("upload", lambda: tier.upload(source, require_owner=free)),
        ("plain put", lambda: store.put(f"{source}/", f"{place}/", recursive=True)),
        ("fetch", lambda: tier.fetch(STEP, folder / "ours")),
        ("plain get", lambda: store.get(f"{place}/", f"{folder}/theirs/", recursive=True)),
    ]
    times = {}
    for pair in (actions[:2], actions[2:]):
        for name, action in reversed(pair) if plain_first else pair:
            times[name] = seconds(action)
    tier.remove(STEP)
    store.rm(place, recursive=True)
    return times


def measure_copies(source: Path, url: str, rounds: int) -> dict[str, object]:
    """Return seconds and ratios of uploading and fetching against plain copies, by which went first."""
    times: dict[str, list[float]] = {name: [] for name in ("upload", "plain put", "fetch", "plain get")}
    for n in range(2 * rounds + 2):
        with tempfile.TemporaryDirectory(dir=source.parents[2]) as folder:
            found = one_round(source, url, Path(folder), plain_first=n % 2 == 0)
        if n > 1:  # one round of each order warms up
            for name, took in found.items():
                times[name].append(took)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "seconds": {name: [round(each, 3) for each in found] for name, found in times.items()},
        "upload to plain put": round(medians["plain put"] / medians["upload"], 3),
        "fetch to plain get": round(medians["plain get"] / medians["fetch"], 3),
    }


def measure_steps(run: Path, url: str, threads: int) -> dict[str, float]:
    """Return the median step alone and while an upload runs beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step, cfg = make_step("cpu"), CheckpointConfig(keep=0)
    alone: list[float] = []
    beside: list[float] = []
    for n in range(4):
        tier = Tier(f"{url}/{uuid.uuid4().hex}")
        uploader = Uploader(tier, run, cfg, records=list, require_owner=free)
        quiet = [seconds(step) for _ in range(QUIET_STEPS // 3)]
        uploader.submit(STEP)
        busy = []
        while not uploader.reports():
            busy.append(seconds(step))
        if n:
            alone, beside = alone + quiet, beside + busy
        tier.remove(STEP)
    torch.set_num_threads(before)
    medians = statistics.median(alone), statistics.median(beside)
    return {
        "alone_s": round(medians[0], 4),
        "beside_s": round(medians[1], 4),
        "ratio": round(medians[1] / medians[0], 3),
        "steps_beside": len(beside),
    }


def exchange(rank: int, folder: str, size: int, memory: str, disk: str, rounds: int) -> None:
    """Rank 0: write to memory, send to rank 1, which writes to its own memory; then to disk alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    content, piece = torch.zeros(size, dtype=torch.uint8).random_(), torch.empty(PIECE, dtype=torch.uint8)
    found: list[dict[str, float]] = []
    for n in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        with Path(f"{memory}/{rank}").open("wb") as file:
            for start in range(0, size, PIECE):
                part = content[start : start + PIECE]
                if rank == 0:
                    file.write(part.numpy().data)
                    dist.send(part, 1)
                else:
                    dist.recv(piece[: len(part)], 0)
                    file.write(piece[: len(part)].numpy().data)
        dist.barrier()
        sent = time.perf_counter() - began
        if rank == 0:
            began = time.perf_counter()
            with Path(f"{disk}/plain-{n}").open("wb") as file:
                file.write(content.numpy().data)
                os.fsync(file.fileno())
            written = time.perf_counter() - began
            if n:
                found.append({"neighbour": sent, "disk": written})
        dist.barrier()
    if rank == 0:
        Path(f"{folder}/times.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_neighbour(directory: Path, memory: Path, *, size: int, rounds: int) -> dict[str, object]:
    """Return seconds for a copy in memory here and at a neighbour, and for a synced write to disk."""
    with (
        tempfile.TemporaryDirectory(dir=directory) as folder,
        tempfile.TemporaryDirectory(dir=memory) as fast,
    ):
        mp.spawn(exchange, (folder, size, fast, folder, rounds), nprocs=2)
        found = json.loads(Path(f"{folder}/times.json").read_text())
    medians = {key: statistics.median(each[key] for each in found) for key in ("neighbour", "disk")}
    return {
        "bytes": size,
        "seconds": {key: [round(each[key], 3) for each in found] for key in medians},
        "gb_per_sec": {key: round(size / 1e9 / value, 3) for key, value in medians.items()},
        "disk to neighbour": round(medians["disk"] / medians["neighbour"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="where to upload to; default: another directory of --dir")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk that has the checkpoint")
    parser.add_argument(
        "--memory-dir", type=Path, default=Path("/dev/shm"), help="on a file system in memory"
    )
    parser.add_argument("--size", type=float, default=0.5, help="GB of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="of each order")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    size, load = round(options.size * 1e9), os.getloadavg()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        run = Path(folder).resolve() / "run"
        source = Checkpointer(run / "checkpoints", CheckpointConfig()).save(STEP, make_state(size), {})
        url = options.url or f"file://{folder}/tier"
        cores = os.cpu_count() or 1
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_machine(),
            "store": url.partition("://")[0],
            "bytes": size,
            "copies": measure_copies(source, url, options.rounds),
            "steps_beside_upload": {
                f"{threads} of {cores} cores": measure_steps(run, url, threads)
                for threads in sorted({max(1, cores - 1), cores})
            },
        }
        shutil.rmtree(run)
        result["neighbour"] = measure_neighbour(
            Path(folder).resolve(), options.memory_dir, size=size, rounds=options.rounds
        )
    result |= {"load_before": load, "load_after": os.getloadavg()}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
