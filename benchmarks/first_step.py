"""Time from the command to the end of the first training step, by phase, with the data in the cache.

    python -m benchmarks.first_step --out benchmarks/results/first_step.json

Each run is a fresh process that does what `megatrain train` does, and ends after its first step. CPU seconds, of all
threads, are beside the wall-clock ones: on a machine that does other things they are closer to what it takes alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

PHASES = ("command", "config", "imports", "data", "model", "first_step")
"""command: the interpreter and the command's own modules; imports: PyTorch and all that training needs."""

CHILD = """
import json, os, sys, time
from importlib import import_module

BEGAN = float(os.environ["FIRST_STEP_BEGAN"])

def stamp(phase):
    print(json.dumps([phase, time.time() - BEGAN, time.process_time()]), file=sys.stderr, flush=True)

def then(function, phase):
    def timed(*args, **kwargs):
        found = function(*args, **kwargs)
        stamp(phase)
        return found
    return timed

from megatrain.cli import job, main
stamp("command")
job.compose = then(job.compose, "config")

from megatrain.cli import train as verb

def patched(argv, cfg, processes, original=verb._train):
    run = import_module("megatrain.train.main")
    loop = import_module("megatrain.train.loop")
    stamp("imports")
    run.prepare = then(run.prepare, "data")
    run.build_state = then(run.build_state, "model")
    step = loop.train_step
    def first(*args, **kwargs):
        step(*args, **kwargs).read()
        stamp("first_step")
        os._exit(0)
    loop.train_step = first
    return original(argv, cfg, processes)

verb._train = patched
sys.exit(main.main(sys.argv[1:]))
"""


def one_run(overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Return the wall-clock and CPU seconds of each phase of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, "train", f"run.dir={folder}", *overrides]
        variables = os.environ | {"FIRST_STEP_BEGAN": str(time.time())}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    stamps = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('["')]
    found, wall, cpu = {}, 0.0, 0.0
    for phase, now, used in stamps:
        found[phase] = (now - wall, used - cpu)
        wall, cpu = now, used
    return found


def summary(runs: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Return the medians of each phase and of the sums, in seconds."""
    names = [phase for phase in PHASES if all(phase in run for run in runs)]
    totals = [[sum(part[kind] for part in run.values()) for run in runs] for kind in (0, 1)]
    return {
        "wall_s": {phase: round(statistics.median(run[phase][0] for run in runs), 3) for phase in names},
        "cpu_s": {phase: round(statistics.median(run[phase][1] for run in runs), 3) for phase in names},
        "wall_total_s": round(statistics.median(totals[0]), 3),
        "wall_totals_s": [round(total, 3) for total in totals[0]],
        "cpu_total_s": round(statistics.median(totals[1]), 3),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    one_run(options.overrides)  # fills the caches: token data, bytecode, pages of the libraries
    load = os.getloadavg()[0]
    result = {
        "command": " ".join(["megatrain train", *options.overrides]),
        "machine": describe_machine(),
        "load_average": round(load, 2),
        "runs": options.runs,
        **summary([one_run(options.overrides) for _ in range(options.runs)]),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
