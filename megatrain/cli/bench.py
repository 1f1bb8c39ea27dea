"""`megatrain bench`: tokens/s, MFU, memory, and where one step's time goes."""

import dataclasses
import json
from typing import TYPE_CHECKING

from megatrain.cli.job import run_in_layout
from megatrain.config.errors import UserError
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config

if TYPE_CHECKING:
    from megatrain.train.bench import BenchResult

DEFAULT_STEPS = 20


def run(argv: list[str]) -> int:
    """Measure the config that the command line describes; returns the exit code."""
    as_json = "--json" in argv
    steps, rest = _take_steps([word for word in argv if word != "--json"])

    def job(cfg: Config, processes: Processes) -> int:
        return _bench(cfg, processes, steps=steps, as_json=as_json)

    return run_in_layout("bench", argv, rest, job)


def _take_steps(argv: list[str]) -> tuple[int, list[str]]:
    """Return the value of --steps N and the other arguments."""
    if "--steps" not in argv:
        return DEFAULT_STEPS, argv
    place = argv.index("--steps")
    value = argv[place + 1] if place + 1 < len(argv) else ""
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--steps {value}: must be an integer of at least 1")
    return int(value), argv[:place] + argv[place + 2 :]


def _bench(cfg: Config, processes: Processes, *, steps: int, as_json: bool) -> int:
    from megatrain.observe.display import (
        make_display,
    )  # imports torch, so only once the config is valid
    from megatrain.train.bench import bench

    display = make_display("off" if as_json or not processes.is_first else cfg.log.display)
    try:
        result = bench(cfg, processes, steps=steps, progress=display.phase)
    finally:
        display.close()
    if processes.is_first:
        print(json.dumps(dataclasses.asdict(result), indent=1) if as_json else render(result))
    return 0


def render(result: "BenchResult") -> str:
    """Return the result as text."""
    rates = result.rates
    fastest, slowest = result.spread_s
    layout = f" ({result.layout})" if result.layout else ""
    lines = [
        f"{result.parameters / 1e6:.1f}M parameters in {result.precision} on {result.device}{layout}, median of "
        f"{result.steps} steps",
        f"  step         {result.step_time_s * 1e3:.1f} ms ({fastest * 1e3:.1f} to {slowest * 1e3:.1f})",
        f"  tokens/s     {rates['perf/tokens_per_sec']:,.0f}",
        f"  TFLOP/s      {rates['perf/tflops_per_device']:.3f} (attention counted in full)",
    ]
    if result.peak_source is not None:
        lines.append(
            f"  MFU          {rates['perf/mfu']:.1%} full attention, {rates['perf/mfu_causal']:.1%} causal, "
            f"of the {result.peak_source} peak"
        )
    lines.append(f"  peak memory  {result.peak_memory_gib:.2f} GiB")
    total = sum(seconds for _, seconds in result.classes) or 1.0
    lines.append("Time of one step by class of operation (slightly slower, since the profiler is running):")
    lines += [f"  {name:22s} {s * 1e3:8.1f} ms  {s / total:6.1%}" for name, s in result.classes]
    lines.append("Slowest operators:")
    lines += [f"  {name[:48]:48s} {s * 1e3:8.1f} ms  {s / total:6.1%}" for name, s in result.operators]
    return "\n".join(lines)
