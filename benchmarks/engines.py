"""Time of a step with DeepSpeed and Accelerate, relative to the native engine in the same layout: two ranks on a CPU.

    python -m benchmarks.engines --rounds 3

All are timed in turn, several rounds; a ratio is that of the medians.
"""

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.scaling import SHAPE, measure

SMALL = (
    "model.n_layers=4",
    "model.hidden_size=192",
    "model.ffn_size=512",
    "model.vocab_size=1024",
    "seq_len=128",
)
REPLICATED = ("parallel.dp_replicate=2",)
ZERO_2 = ("parallel.dp_shard=2", "parallel.zero_stage=2")
ZERO_3 = ("parallel.dp_shard=2", "parallel.zero_stage=3")
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "native, ZeRO-0": ("native", REPLICATED),
    "deepspeed, ZeRO-0": ("deepspeed", REPLICATED),
    "accelerate, DDP": ("accelerate", REPLICATED),
    "native, ZeRO-2": ("native", ZERO_2),
    "deepspeed, ZeRO-2": ("deepspeed", ZERO_2),
    "deepspeed, ZeRO-2, offload": ("deepspeed", (*ZERO_2, "deepspeed.offload_optimizer=true")),
    "native, ZeRO-3": ("native", ZERO_3),
    "deepspeed, ZeRO-3": ("deepspeed", ZERO_3),
    "accelerate, FSDP2": ("accelerate", ZERO_3),
}
"""Name -> engine and layout; each follows the native run that it is compared with."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines_cpu.json"))
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    for number in range(options.rounds):
        for name, (engine, layout) in RUNS.items():
            seconds, _ = measure((*SMALL, f"engine={engine}", *layout), options.steps)
            times[name].append(seconds)
            print(f"round {number + 1}/{options.rounds}  {name}: {times[name][-1]:.3f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base, rows = 0.0, dict[str, Any]()
    for name, (engine, _) in RUNS.items():
        base = medians[name] if engine == "native" else base
        rows[name] = {
            "step_time_s": medians[name],
            "all": times[name],
            "ratio_to_native": medians[name] / base,
        }
        print(f"{name:28s} {medians[name]:8.3f} s  {rows[name]['ratio_to_native']:5.2f}")
    result = {
        "command": f"python -m benchmarks.engines --rounds {options.rounds} --steps {options.steps}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "shape": [*SHAPE, *SMALL],
        "runs": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
