"""`megatrain bench`: tokens/s, MFU, memory, and where one step's time goes; of a sweep, a table."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.cli.bench_sweep import run_measurements
from megatrain.cli.compose import Source, compose
from megatrain.cli.job import run_in_layout
from megatrain.cli.options import Parser, parse_options
from megatrain.config.errors import UserError
from megatrain.runtime.processes import Processes, is_started
from megatrain.train.config import Config

if TYPE_CHECKING:
    from megatrain.train.bench import BenchResult

DEFAULT_STEPS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Flags:
    """The flags of this verb."""

    steps: int
    as_json: bool
    trace: str | None
    force: bool
    tune: bool

    def words(self) -> list[str]:
        """Return the flags but --json and --trace as they are written."""
        switches = {"--force": self.force, "--tune": self.tune}
        return [f"--steps={self.steps}", *(name for name, on in switches.items() if on)]


def run(argv: list[str]) -> int:
    """Measure the config that the command line describes, or every one of a sweep; return the exit code."""
    flags, rest = _take_flags(argv)
    options = parse_options("bench", rest)
    if options.multirun and not options.cfg and not is_started():
        source = Source(options.config_dir, options.config_name)
        return run_measurements(
            options.overrides, source, flags.words(), as_json=flags.as_json, trace=flags.trace
        )

    def job(cfg: Config, processes: Processes) -> int:
        preset = _preset_seq_len(cfg, options.overrides, Source(options.config_dir, options.config_name))
        return _bench(cfg, processes, flags, argv, preset)

    return run_in_layout("bench", argv, rest, job)


def _take_flags(argv: list[str]) -> tuple[Flags, list[str]]:
    """Return this verb's flags and the other arguments.

    Raises:
        UserError: a flag lacks its value, or has a wrong one.
    """
    parser = Parser("bench")
    parser.add_argument("--steps", default=str(DEFAULT_STEPS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--tune", action="store_true")
    found, rest = parser.parse_known_args(argv)
    if not found.steps.isdecimal() or int(found.steps) < 1:
        raise UserError(f"--steps {found.steps}: must be an integer of at least 1")
    if found.trace is not None and Path(found.trace).exists() and not Path(found.trace).is_dir():
        raise UserError(f"--trace {found.trace}: must be a directory, which is made if it does not exist")
    return Flags(int(found.steps), found.json, found.trace, found.force, found.tune), rest


def _preset_seq_len(cfg: Config, overrides: list[str], source: Source) -> int | None:
    """Return the sequence length of the model's recipe where the command line sets another one."""
    chosen = [word for word in overrides if word.startswith(("model=", "experiment="))]
    if not chosen or not any(word.startswith("seq_len=") for word in overrides):
        return None
    with contextlib.suppress(UserError):
        return compose(chosen, source).seq_len
    return None


def _bench(cfg: Config, processes: Processes, flags: Flags, argv: list[str], preset: int | None) -> int:
    # These import torch, so only once the config is valid.
    from megatrain.observe.display import make_display
    from megatrain.train.bench import Request, bench, is_out_of_memory

    if flags.tune:
        _tune()
    request = Request(
        steps=flags.steps,
        trace=None if flags.trace is None else Path(flags.trace),
        force=flags.force,
        command=("megatrain", "bench", *argv),
        preset_seq_len=preset,
    )
    with contextlib.redirect_stdout(sys.stderr if flags.as_json else sys.stdout):
        mode = "plain" if flags.as_json else cfg.log.display
        display = make_display(mode if processes.is_first else "off")
        try:
            result = bench(cfg, processes, request, progress=display.phase, say=display.notice)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"megatrain: out of memory: {_first_sentence(error)}", file=sys.stderr)
            return 1
        finally:
            display.close()
    if processes.is_first:
        print(json.dumps(dataclasses.asdict(result), indent=1) if flags.as_json else render(result))
    return 0


def _tune() -> None:
    """Make kernels time all block sizes, and write the fastest into the user's table.

    Raises:
        UserError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "--tune: there is no GPU here, and block sizes are those of a GPU's kernels; leave it out"
        )
    os.environ["MEGATRAIN_TUNE"] = "1"


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].splitlines()[0]


def render(result: "BenchResult") -> str:
    """Return the result as text."""
    rates, profile = result.rates, result.profile
    fastest, slowest = result.spread_s
    layout = f" ({result.layout})" if result.layout else ""
    device = result.machine["gpu"] or f"CPU, {threads(result.machine['threads_per_process'])} a process"
    lines = [
        f"{result.parameters / 1e6:.1f}M parameters in {result.precision} on {device}{layout}, "
        f"{result.global_batch_size} x {result.seq_len} tokens a step in micro-batches of {result.micro_batch_size}, "
        f"median of {result.steps} steps",
        f"  step         {result.step_time_s * 1e3:.1f} ms ({fastest * 1e3:.1f} to {slowest * 1e3:.1f})",
        f"  tokens/s     {rates['perf/tokens_per_sec']:,.0f}",
        f"  TFLOP/s      {rates['perf/tflops_per_device']:.3f} per process (attention counted in full)",
    ]
    if result.peak is not None:
        lines.append(
            f"  MFU          {rates['perf/mfu']:.1%} with attention in full, {rates['perf/mfu_causal']:.1%} causal, of "
            f"{_tflops(result.peak)}"
        )
    taken = ", ".join(f"{name} {' and '.join(paths)}" for name, paths in result.paths.items())
    lines.append(f"  operations   {taken}")
    lines.append(f"  peak memory  {result.peak_memory_gib:.2f} GiB")
    total = profile.step_time_s
    lines.append(f"Time of one step by class of work ({total * 1e3:.1f} ms; the profiler makes it slower):")
    lines += [f"  {name:46s} {s * 1e3:8.1f} ms  {s / total:6.1%}" for name, s in profile.classes]
    if profile.communication:
        lines.append("Communication of one step of the first process (waiting for the others included):")
        lines += [
            f"  {f'{talk.axis} {talk.collective}':46s} {talk.seconds * 1e3:8.1f} ms  {talk.calls:6.0f} calls  "
            f"{talk.bytes / 2**20:9.2f} MiB"
            for talk in profile.communication
        ]
    lines.append("Slowest operators:")
    lines += [f"  {name[:46]:46s} {s * 1e3:8.1f} ms  {s / total:6.1%}" for name, s in profile.operators]
    lines += [f"Note: {note}." for note in result.notes]
    if result.trace:
        lines.append(f"Traces (open them in https://ui.perfetto.dev): {', '.join(result.trace)}")
    return "\n".join(lines)


def threads(number: object) -> str:
    """Return a number of threads in words."""
    return f"{number} thread{'s' * (number != 1)}"


def _tflops(peak: dict[str, object]) -> str:
    """Return the peak and its source in words."""
    flops = peak["flops_per_s"]
    assert isinstance(flops, float)
    return f"{flops / 1e12:.3g} TFLOP/s, {peak['source']}"
