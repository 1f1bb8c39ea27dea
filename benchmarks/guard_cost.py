"""What the record of collectives costs: for a call by itself, and as a share of training steps.

    python -m benchmarks.guard_cost --out benchmarks/results/guard_cost.json

All times are processor time, which other programs on the machine do not lengthen. The share is computed: calls of a
step, counted at the seam, times the cost of one, over the time of the step.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.scaling import LAYOUTS, SHAPE
from benchmarks.synthetic import random_batch
from megatrain.cli.compose import Source, compose
from megatrain.parallel.layout import data_ranks
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.guard.record import Record
from megatrain.runtime.guard.seam import Seam
from megatrain.runtime.workers import WorkerPool
from megatrain.train.build import build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

CALLS = 20000
DEPTHS = (2, 12)
"""Frames of torch between the project's line and a collective: of a direct call, and of one that FSDP's hooks make."""
STEPS = 2


class Nothing:
    """A collective that does nothing, called as torch calls those of a group of two."""

    group_name = "nothing"

    def rank(self) -> int:
        """Return 0."""
        return 0

    def size(self) -> int:
        """Return 2."""
        return 2


def cost_ns(depth: int) -> float:
    """Return the nanoseconds that the seam adds to a call that is `depth` frames of torch below the project's line."""
    seam = Seam(Record(), lambda message: None)
    group: Any = Nothing()
    seam._channels[group] = seam.record.channel()
    tensors = [torch.zeros(4, 4)]

    def plain(group: Any, *args: Any) -> None:
        return None

    def wait(work: Any) -> None:
        return None

    recorded, waited = seam._wrapped("all_reduce", plain), seam._wrapped_wait(wait)
    source = "def deeper(n, call):\n    return deeper(n - 1, call) if n else call()\n"
    space: dict[str, Any] = {}
    exec(compile(source, "/site-packages/torch/deeper.py", "exec"), space)

    def both() -> None:
        recorded(group, tensors)
        waited(None)

    def neither() -> None:
        plain(group, tensors)
        wait(None)

    def ns(call: Any) -> float:
        began = time.thread_time_ns()
        for _ in range(CALLS):
            space["deeper"](depth, call)
        return (time.thread_time_ns() - began) / CALLS

    return statistics.median(ns(both) - ns(neither) for _ in range(7))


def calls_of_a_step(cfg: Config) -> tuple[int, float]:
    """Return the calls at the seam in one step of this rank, and the median processor seconds of a step."""
    torch.set_num_threads(1)
    device, record = torch.device("cpu"), Record()
    with Seam(record, lambda message: None):
        state = build_state(cfg, device, make_mesh(cfg.parallel, device))
        batch = random_batch(cfg, seed=0)
        batch.micro_batches[:] = batch.micro_batches[: len(batch.micro_batches) // data_ranks(cfg.parallel)]
        train_step(state, batch, cfg, lr=1e-3)
        before, seconds = record.entries, []
        for _ in range(STEPS):
            began = time.process_time()
            train_step(state, batch, cfg, lr=1e-3).read()
            seconds.append(time.process_time() - began)
    return (record.entries - before) // STEPS, statistics.median(seconds)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cost = {f"{depth} frames": round(cost_ns(depth)) for depth in DEPTHS}
    print(json.dumps(cost), flush=True)
    rows = {}
    with WorkerPool("megatrain.train.build") as pool:
        for name, layout in LAYOUTS.items():
            if not layout:
                continue
            cfg = compose([*SHAPE, *layout], Source(None, "config"))
            calls, seconds = pool.run(calls_of_a_step, 2, cfg)[0]
            share = calls * max(cost.values()) / 1e9 / seconds
            rows[name] = {
                "calls_a_step": calls,
                "processor_s_a_step": round(seconds, 3),
                "share": float(f"{share:.2g}"),
            }
            print(name, rows[name], flush=True)
    result = {
        "command": f"python -m benchmarks.guard_cost --out {options.out}",
        "machine": describe_machine(),
        "model": list(SHAPE),
        "ns_a_call_by_frames_of_torch": cost,
        "layouts": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
