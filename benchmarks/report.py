"""How long `megatrain report` takes on a run of a million rows, and how large its page is.

python -m benchmarks.report --rows 1000000 --out benchmarks/results/report.json
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import describe_machine
from megatrain.observe.report.page import report

SEED = 0


def rows(count: int) -> Iterator[str]:
    """Yield the lines of a run's metrics.jsonl: a noisy loss with a peak, and every 1,000 steps a validation."""
    draw = random.Random(SEED)
    for step in range(1, count + 1):
        loss = 2 + 8 * math.exp(-8 * step / count) + draw.gauss(0, 0.05) + 6 * (step == count // 3)
        rate = draw.gauss(5000, 100)
        row = {
            "step": step,
            "train/loss": loss,
            "train/grad_norm": abs(draw.gauss(0.7, 0.1)),
            "train/lr": 1e-3 * (1 - step / count),
            "train/tokens": step * 2048,
            "data/sample_digest": "976f300d0836d853",
            "perf/step_time_s": 2048 / rate,
            "perf/data_time_s": 0.006,
            "perf/tokens_per_sec": rate,
            "perf/tokens_per_sec_per_device": rate,
            "perf/tflops_per_device": rate / 1e5,
            "perf/mfu": rate / 4e4,
            "perf/mfu_causal": rate / 5e4,
            "memory/peak_gib": 0.4445,
        }
        if step % 1000 == 0:
            row |= {"eval/loss": loss + 0.1, "eval/bits_per_byte": loss / 3}
        yield json.dumps(row) + "\n"


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        with metrics.open("w") as file:
            file.writelines(rows(options.rows))
        seconds, cpu_seconds = [], []
        for _ in range(3):
            began, used = time.perf_counter(), time.process_time()
            page = report([Path(folder)])
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - used)
        result = {
            "rows": options.rows,
            "metrics_bytes": metrics.stat().st_size,
            "seconds": [round(each, 2) for each in seconds],
            "cpu_seconds": [round(each, 2) for each in cpu_seconds],
            "page_bytes": page.stat().st_size,
            "seed": SEED,
            "machine": describe_machine(),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
