"""`megatrain federate`: runs that train apart, and whose weights are brought together from time to time."""

import math
from pathlib import Path

from megatrain.cli.actions import progress_display, run_action
from megatrain.cli.options import Parser
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded


def run(argv: list[str]) -> int:
    """Run one action; return the exit code."""
    return run_action("federate", {"start": _start, "round": _round}, argv)


def _start(argv: list[str]) -> int:
    parser = Parser("federate")
    parser.add_argument("base", type=_path)
    parser.add_argument("server", type=_path)
    flags = parser.parse_intermixed_args(argv)
    from megatrain.train.federate import start

    with progress_display(as_json=False) as display:
        start(flags.base, flags.server, progress=display.phase)
    print(
        f"{flags.server}: round 0, the weights of {flags.base}. Workers start with checkpoint.adopt={flags.server}"
    )
    return 0


def _round(argv: list[str]) -> int:
    parser = Parser("federate")
    parser.add_argument("server", type=_path)
    parser.add_argument("workers", type=_path, nargs="+")
    parser.add_argument("--outer", choices=("average", "nesterov"), default="average")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--weights", choices=("tokens", "equal"))
    flags = parser.parse_intermixed_args(argv)
    for name, value, below in (("lr", flags.lr, math.inf), ("momentum", flags.momentum, 1.0)):
        if value is not None and not 0 <= value < below:
            raise UserError(f"federate: --{name} {value}: must be at least 0 and below {below:g}")
    from megatrain.train.federate import AVERAGE, Outer, next_round

    usual = AVERAGE if flags.outer == "average" else Outer()
    outer = Outer(
        lr=usual.lr if flags.lr is None else flags.lr,
        momentum=usual.momentum if flags.momentum is None else flags.momentum,
        weighting=flags.weights or usual.weighting,
    )
    with progress_display(as_json=False) as display:
        number, workers = next_round(flags.server, flags.workers, outer, progress=display.phase)
    print(f"{flags.server}: round {number}, of {len(workers)} worker{'s' * (len(workers) > 1)}")
    for worker in workers:
        print(f"  {worker.run}: step {worker.found.step}, {worker.tokens:,} tokens since the round before")
    return 0


def _path(text: str) -> Path:
    return Path(expanded(text))
