"""Everything that a GPU can tell about the project, in under nine minutes.

    PYTHONPATH=.:kernels python -m benchmarks.gpu --out DIR

writes DIR/gpu.json and DIR/gpu.md: the machine's ceilings, every operation's correctness, every operation's speed
beside public implementations, and whole training steps. It takes torch, triton and numpy.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.report import failures, save
from benchmarks.gpu.supervise import SHARES, TOTAL_S, supervise, worker_command


def main() -> int:
    """Run the benchmark; return 0 if every step of ours ran and every result was right, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--only", choices=list(SHARES), help="this part alone, in all of the time")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="of all parts (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="shapes for a CPU; always so where there is no GPU"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    progress = supervise(
        [options.only] if options.only else list(SHARES),
        small=options.small or not torch.cuda.is_available(),
        seconds=options.seconds,
        write=lambda progress: save(progress, about, options.out),
        command=worker_command(),
    )
    print((options.out / "gpu.md").read_text())
    wrong = failures(progress.rows) or [row for row in progress.rows if row.get("right") is False]
    return int(bool(wrong or progress.cuts))


if __name__ == "__main__":
    sys.exit(main())
