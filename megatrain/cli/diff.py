"""`megatrain diff`: the first step and quantity in which two runs part."""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.cli.actions import progress_display, strict_json
from megatrain.cli.options import Parser
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.config.schema import shown

if TYPE_CHECKING:
    from megatrain.train.differ import RunDifference

DIFFERENT = 1
"""Exit code of a comparison that found a difference, as diff(1) has it."""


def run(argv: list[str]) -> int:
    """Compare two runs; return the exit code."""
    parser = Parser("diff")
    parser.add_argument("run_a")
    parser.add_argument("run_b")
    parser.add_argument("--rtol", type=float, default=0.0)
    parser.add_argument("--no-tensors", action="store_true")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_intermixed_args(argv)
    if not 0 <= flags.rtol < math.inf:
        raise UserError(f"diff: --rtol {flags.rtol}: must be finite and at least 0")
    from megatrain.train.differ import compare_runs  # imports torch, so only once the command line is valid

    a, b = (Path(expanded(each)) for each in (flags.run_a, flags.run_b))
    with progress_display(flags.json) as display:
        found = compare_runs(a, b, rtol=flags.rtol, with_tensors=not flags.no_tensors, progress=display.phase)
    if flags.json:
        print(json.dumps(strict_json(as_json(found)), indent=1, allow_nan=False))
    else:
        print(as_text(found))
    return 0 if found.equal else DIFFERENT


def as_json(found: "RunDifference") -> dict[str, Any]:
    """Return what differs as plain data."""
    from megatrain.cli.checkpoint_text import comparison_json

    return {
        "a": str(found.a),
        "b": str(found.b),
        "equal": found.equal,
        "rtol": found.rtol,
        "first": None if found.first is None else dataclasses.asdict(found.first),
        "config": found.config,
        "config_without_effect": found.free,
        "data": found.data,
        "steps": found.steps,
        "last_steps": found.last_steps,
        "quantities": [dataclasses.asdict(each) for each in found.partings],
        "checkpoint": found.checkpoint,
        "tensors": None if found.tensors is None else comparison_json(found.tensors),
    }


def as_text(found: "RunDifference") -> str:
    """Return the verdict, and below it every kind of difference."""
    from megatrain.cli.checkpoint_text import comparison_lines, value_text

    def pairs(rows: dict[str, tuple[Any, Any]]) -> list[str]:
        return [f"  {key}: {value_text(shown(a))} and {value_text(shown(b))}" for key, (a, b) in rows.items()]

    lines = [f"a: {found.a}", f"b: {found.b}", _verdict(found)]
    if found.config:
        lines += ["Config keys that change results:", *pairs(found.config)]
    if found.free:
        lines += ["Config keys that change no results:", *pairs(found.free)]
    if found.data:
        lines += [f"The data differ: fingerprint {value_text(found.data[0])} and {value_text(found.data[1])}"]
    if found.partings:
        lines.append(f"First difference of each quantity, in {found.steps:,} steps that both recorded:")
        lines += [
            f"  step {each.step:,}: {each.quantity} {value_text(each.a)} and {value_text(each.b)}"
            for each in found.partings
        ]
    if found.tensors is not None and not found.tensors.equal:
        lines += [f"Checkpoint of step {found.checkpoint:,}, the newest that both have:"]
        lines += [f"  {line}" for line in comparison_lines(found.tensors)]
    return "\n".join([*lines, *_limits(found)])


def _verdict(found: "RunDifference") -> str:
    first, to = found.first, f" to {found.rtol:g}" if found.rtol else ""
    if first is not None:
        return f"The runs part at step {first.step:,}, in {first.quantity}."
    if found.equal:
        tensors = "" if found.tensors is None else f" and the checkpoint of step {found.checkpoint:,}"
        return f"Equal{to}: {found.steps:,} recorded steps{tensors}."
    what = " and ".join(["config"] * bool(found.config) + ["data"] * bool(found.data))
    return f"The runs differ in {what}, but in no recorded step{to}."


def _limits(found: "RunDifference") -> list[str]:
    """Return what could not be compared."""
    lines = []
    if not found.steps:
        lines.append("No step was recorded by both, so no losses were compared.")
    elif found.last_steps[0] != found.last_steps[1]:
        lines.append(f"a was recorded up to step {found.last_steps[0]:,}, b up to {found.last_steps[1]:,}.")
    if found.checkpoint is None:
        lines.append("No tensors were compared: none were asked for, or no step was saved by both.")
    return lines
