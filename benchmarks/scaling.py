"""Two processes of one thread against one process of two threads, on the same two cores, in one run.

    python -m benchmarks.scaling --rounds 3

Each layout is timed in turn, several rounds; medians and their ratios are written. The cores are the same, so what is
missing from 1 is communication, waiting, and work that ranks repeat or do in smaller pieces: the time of each class of
work, from the profile of the last round's first process, says how much of it is which.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

SHAPE = (
    "data=synthetic",
    "model=llama3_debug",
    "model.n_layers=6",
    "model.hidden_size=384",
    "model.n_heads=6",
    "model.n_kv_heads=6",
    "model.ffn_size=1024",
    "model.vocab_size=4096",
    "seq_len=256",
    "global_batch_size=16",
    "micro_batch_size=4",
    "train.precision=fp32",
)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one process, two threads": (),
    "dp_shard=2, zero_stage=0": ("parallel.dp_shard=2", "parallel.zero_stage=0"),
    "dp_shard=2, zero_stage=3": ("parallel.dp_shard=2",),
    "tp=2": ("parallel.tp=2",),
    "pp=2": ("parallel.pp=2",),
    "cp=2": ("parallel.cp=2",),
}
BASE = "one process, two threads"


def measure(layout: tuple[str, ...], steps: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of a step, the median that `megatrain bench` reports, and the share of each class of work."""
    threads = "1" if layout else "2"
    command = [sys.executable, "-m", "megatrain", "bench", *SHAPE, *layout, "--json", "--steps", str(steps)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout)
    profile = found["profile"]
    return float(found["step_time_s"]), {name: s / profile["step_time_s"] for name, s in profile["classes"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling_cpu.json"))
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    shares: dict[str, dict[str, float]] = {}
    for number in range(options.rounds):
        for name, layout in LAYOUTS.items():
            seconds, shares[name] = measure(layout, options.steps)
            times[name].append(seconds)
            print(f"round {number + 1}/{options.rounds}  {name}: {times[name][-1]:.3f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, Any] = {
        name: {
            "step_time_s": medians[name],
            "all": times[name],
            "speed_ratio": medians[BASE] / medians[name],
            "seconds_by_class": {each: share * medians[name] for each, share in shares[name].items()},
        }
        for name in LAYOUTS
    }
    result = {
        "command": f"python -m benchmarks.scaling --rounds {options.rounds} --steps {options.steps}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "shape": list(SHAPE),
        "layouts": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:28s} {row['step_time_s']:8.3f} s  {row['speed_ratio']:5.2f}")
        for each, seconds in sorted(row["seconds_by_class"].items(), key=lambda pair: -pair[1])[:8]:
            print(f"    {each:44s} {seconds:8.3f} s")


if __name__ == "__main__":
    main()
