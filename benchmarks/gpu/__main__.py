"""Everything that a GPU can tell about the project, in seven minutes.

    PYTHONPATH=.:kernels python -m benchmarks.gpu --out DIR

writes DIR/gpu.json and DIR/gpu.md, after every step anew: the machine's ceilings, every operation's correctness, every
operation's speed beside public implementations, and whole training steps. It takes torch, triton and numpy.
`--plan` says what would run, without a GPU; `--aims FILE` judges an older gpu.json by today's aims.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.aims import aims
from benchmarks.gpu.report import failures, of_part, save, table
from benchmarks.gpu.steps import Setting
from benchmarks.gpu.supervise import (
    PARTS,
    TOTAL_S,
    Plan,
    deadlines,
    default_lanes,
    supervise,
    worker_command,
)
from benchmarks.gpu.worker import steps_of


def main() -> int:
    """Run the benchmark; return 0 if every step of ours ran and every result was right, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="directory to write to")
    parser.add_argument("--only", choices=list(PARTS), help="this part alone, in all of the time")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="of all parts (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="shapes for a CPU; always so where there is no GPU"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run on a GPU, and run nothing")
    parser.add_argument("--aims", type=Path, metavar="FILE", help="print the aims that a gpu.json meets")
    options = parser.parse_args()
    parts = [options.only] if options.only else list(PARTS)
    if options.aims is not None:
        print(judged(options.aims))
        return 0
    if options.plan:
        print(
            described(
                plan_of(parts, torch.device("cpu" if options.small else "cuda"), options.small),
                options.seconds,
            )
        )
        return 0
    if options.out is None:
        parser.error("--out is required")
    options.out.mkdir(parents=True, exist_ok=True)
    # Block sizes are timed anew, and kept: benchmarks.attention_blocks puts them into the table that is shipped.
    os.environ |= {
        "MEGATRAIN_TUNE": "1",
        "MEGATRAIN_TUNED": str(options.out.absolute() / "attention_blocks.json"),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    on_gpu = torch.cuda.is_available()
    small = options.small or not on_gpu
    progress = supervise(
        plan_of(parts, torch.device("cuda" if on_gpu else "cpu"), small),
        small=small,
        seconds=options.seconds,
        write=lambda progress: save(progress, about, options.out),
        command=worker_command(),
        lanes=default_lanes(),
    )
    print((options.out / "gpu.md").read_text())
    wrong = failures(progress.rows) or [row for row in progress.rows if row.get("right") is False]
    return int(bool(wrong or progress.cuts))


def plan_of(parts: list[str], device: torch.device, small: bool) -> Plan:
    """Return the names of each part's steps on such a device, which need not be there."""
    setting = Setting(device, small)
    return {part: [step.name for step in steps_of(part, setting)] for part in parts}


def described(plan: Plan, seconds: float) -> str:
    """Return what runs in which order, and how long each part may take, as Markdown."""
    lines, before = [], 0.0
    for part, end in deadlines(list(plan), seconds, 0.0).items():
        who = "a pool of processes" if PARTS[part].pooled else "one process"
        lines += [f"## {part}: {end - before:.0f} s, {who}, {len(plan[part])} steps", ""]
        lines += [f"{number}. {name}" for number, name in enumerate(plan[part], 1)]
        lines.append("")
        before = end
    return "\n".join(lines)


def judged(file: Path) -> str:
    """Return the aims of a recorded gpu.json by today's rule, as a Markdown table."""
    found = json.loads(file.read_text())
    rows = aims(of_part(found["rows"], "speed"), of_part(found["rows"], "training"))
    lines = [
        [row["aim"], row["cases"], row["measured"], "not measured" if row["met"] is None else row["met"]]
        for row in rows
    ]
    return table("aim | cases | measured | met", lines)


if __name__ == "__main__":
    sys.exit(main())
