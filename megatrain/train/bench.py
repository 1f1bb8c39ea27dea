"""Measure how fast a config trains on this machine, and where a step's time goes. Nothing is written but traces."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatrain.config.load import dump
from megatrain.models.flops import flops_per_token, n_params
from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.profile import STEPS, Breakdown, breakdown
from megatrain.parallel.layout import layout_summary
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.device import Peak, choose_precision, memory_bytes, peak_flops, pick_device
from megatrain.runtime.processes import Processes
from megatrain.train.auto import require_memory, resolve_auto, with_precision
from megatrain.train.bench_facts import (
    BusyCores,
    code_facts,
    debug_flags,
    machine_facts,
    usable_cores,
    version_facts,
)
from megatrain.train.bench_notes import Circumstances, notes
from megatrain.train.build import COMPUTE_DTYPE, build_loader, build_state, prepare_together, with_layout
from megatrain.train.config import Config
from megatrain.train.estimate import Estimate, describe, estimate, require_room
from megatrain.train.labels import settle_labels
from megatrain.train.micro_batch import USABLE
from megatrain.train.step import train_step
from megatrain_kernels.kernel import watching

WARM_UP = 3
"""Number of steps that are not measured: allocators and libraries initialize."""
LONG_STEP_S = 10.0
"""Duration of a step from which on one warm-up step and one profiled step are enough."""
FLOP_CONVENTION = {
    "perf/mfu": "attention counted in full, every query against every key (PaLM, arXiv 2204.02311, appendix B)",
    "perf/mfu_causal": "only the query-key pairs that the causal or windowed mask leaves",
    "both": "2 FLOPs a multiply-add of matrix products, backward twice forward, recomputation and lookups not counted",
}


@dataclass(frozen=True)
class Request:
    """What to measure beside the config."""

    steps: int
    trace: Path | None = None
    """Directory that gets a trace of each process."""
    force: bool = False
    """Measure although the estimate exceeds the memory; weights and gradients must fit all the same."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""
    preset_seq_len: int | None = None
    """The sequence length of the model's recipe, where the config has another one."""


@dataclass(frozen=True)
class BenchResult:
    """Medians over the measured steps, where their time goes, and everything needed to repeat the measurement."""

    layout: str
    precision: str
    parameters: int
    active_parameters: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    steps: int
    warm_up_steps: int
    step_time_s: float
    spread_s: tuple[float, float]
    """Duration of the fastest and the slowest measured step, in seconds."""
    step_times_s: list[float]
    rates: dict[str, float]
    """Tokens/s, TFLOP/s and MFU by their names in metrics.jsonl."""
    flop_convention: dict[str, str]
    flops_per_token: dict[str, float]
    """FLOPs of forward and backward by convention."""
    peak: dict[str, object] | None
    """What MFU is a share of: FLOP/s of one device, type and source; None if unknown."""
    paths: dict[str, list[str]]
    """Which implementation of each operation the steps took: torch, triton, ..."""
    peak_memory_gib: float
    """The most that any process held."""
    estimate: Estimate
    """What was expected before the measurement."""
    profile: Breakdown
    """Of the first process."""
    notes: list[str]
    """Why the figures may not tell what they seem to."""
    trace: list[str]
    """Files with traces."""
    machine: dict[str, object]
    versions: dict[str, str | None]
    code: dict[str, str | bool | None]
    command: tuple[str, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Setup:
    """What is known before the first step."""

    cfg: Config
    """Everything that was `auto` is decided."""
    device: torch.device
    processes: Processes
    request: Request
    memory: int
    """Bytes that this process may fill."""
    peak: Peak | None
    """FLOP/s of one process."""


def bench(
    cfg: Config,
    processes: Processes,
    request: Request,
    *,
    progress: Callable[[str, float], None],
    say: Callable[[str], None],
) -> BenchResult:
    """Time training steps of `cfg` on its own data; the breakdown is that of the first process.

    Args:
        progress: gets the name of a phase and the fraction of it that is done. say: gets the estimate, line by line.

    Raises:
        UserError: the data is invalid or too short, or the memory is estimated not to suffice.
    """
    setup = _prepare(cfg, processes, request)
    cfg, device = setup.cfg, setup.device
    expected = processes.from_first(
        lambda: estimate(cfg, peak=setup.peak, memory=setup.memory, on_cpu=device.type == "cpu")
    )
    is_long = expected.step_s is not None and expected.step_s[0] > LONG_STEP_S
    warm_up, profiled = (1, 1) if is_long else (WARM_UP, STEPS)
    for line in describe(expected, cfg, steps=warm_up + request.steps + profiled):
        say(line)
    if not request.force:
        require_room(expected)
    cfg, data = settle_labels(cfg, prepare_together(cfg, processes, progress=progress))
    mesh = make_mesh(cfg.parallel, device) if processes.size > 1 else None
    processes.limit_waits(cfg.resilience.timeout_s)
    state, batches = build_state(cfg, device, mesh), build_loader(cfg, data.train, mesh).batches(0)

    def step() -> None:
        with record_function("data"):
            batch = next(batches)
        train_step(state, batch, cfg, lr=0.0).read()  # waits for the device

    reset_peak_memory(device)
    before = BusyCores.now()
    with watching() as paths:
        times = _time_steps(step, warm_up, request.steps, progress)
    others = before.others(processes.local_size)
    held = max(processes.gather(peak_memory_gib(device)))
    progress("profiling", 0.0)
    with _traced(request.trace, processes.rank, device) as files:
        trace = files[0] if files else None
        profile = breakdown(step, state.parallel.models, mesh=mesh, steps=profiled, trace=trace)
    batches.close()  # type: ignore[attr-defined]
    state.close()
    return _result(
        setup,
        times,
        warm_up_steps=warm_up,
        paths={name: sorted(found) for name, found in sorted(paths.items())},
        peak_memory_gib=held,
        estimate=expected,
        profile=profile,
        notes=notes(cfg, _circumstances(setup, times, profile, others)),
        trace=[str(path) for paths in processes.gather(files) for path in paths],
    )


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device's or the machine's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def _prepare(cfg: Config, processes: Processes, request: Request) -> _Setup:
    """Decide everything that is `auto`, and measure or look up the device's peak.

    Raises:
        UserError: not even the weights and gradients fit in the memory.
    """
    cfg = with_layout(cfg, processes.size)
    processes.limit_waits(cfg.resilience.timeout_s)
    device = pick_device(processes.local_rank)
    if cfg.train.precision == "auto":
        cfg = with_precision(cfg, processes.from_first(lambda: choose_precision(device)))
    memory = memory_bytes(device, processes.local_size)
    processes.from_first(lambda: require_memory(cfg, memory))  # also with `force`: it is no estimate
    cfg = processes.from_first(lambda: resolve_auto(cfg, memory=memory))
    peak = peak_flops(device, COMPUTE_DTYPE[cfg.train.precision])
    return _Setup(cfg, device, processes, request, memory, peak)


def _time_steps(
    step: Callable[[], None], warm_up: int, steps: int, progress: Callable[[str, float], None]
) -> list[float]:
    """Return the seconds of each step after the warm-up."""
    times: list[float] = []
    for number in range(warm_up + steps):
        progress("measuring steps", number / (warm_up + steps))
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def _circumstances(setup: _Setup, times: list[float], profile: Breakdown, others: float) -> Circumstances:
    cfg = setup.cfg
    plain = dataclasses.replace(cfg.parallel, activation_checkpointing="none")
    without = estimate(
        dataclasses.replace(cfg, parallel=plain),
        peak=None,
        memory=setup.memory,
        on_cpu=setup.device.type == "cpu",
    )
    return Circumstances(
        times=times,
        profile=profile,
        on_cpu=setup.device.type == "cpu",
        threads=torch.get_num_threads(),
        processes=setup.processes.local_size,
        cores=usable_cores(),
        others=others,
        flags=debug_flags(),
        fits_without_checkpointing=without.needed_gib < USABLE * without.memory_gib,
        preset_seq_len=setup.request.preset_seq_len,
    )


@contextmanager
def _traced(folder: Path | None, rank: int, device: torch.device) -> Iterator[list[Path]]:
    """Yield the files of a process's traces: the profile's, and on a GPU a snapshot of its memory, written here."""
    if folder is None:
        yield []
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"trace-rank-{rank}.json"]
    if device.type != "cuda":
        yield files
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield files
        snapshot = folder / f"memory-rank-{rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        files.append(snapshot)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _result(setup: _Setup, times: list[float], **measured: Any) -> BenchResult:
    """Put the figures together with all that they depend on."""
    cfg, request, peak, device = setup.cfg, setup.request, setup.peak, setup.device
    flops = {
        kind: flops_per_token(cfg.model, cfg.seq_len, causal=kind == "causal") for kind in ("full", "causal")
    }
    median = statistics.median(times)
    return BenchResult(
        layout=layout_summary(cfg.parallel),
        precision=cfg.train.precision,
        parameters=n_params(cfg.model),
        active_parameters=n_params(cfg.model, active=True),
        seq_len=cfg.seq_len,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.resolved_micro_batch_size,
        seed=cfg.train.seed,
        steps=request.steps,
        step_time_s=median,
        spread_s=(min(times), max(times)),
        step_times_s=times,
        rates=throughput(
            cfg.global_batch_size * cfg.seq_len,
            median,
            flops_per_token_full=flops["full"],
            flops_per_token_causal=flops["causal"],
            peak=peak,
            devices=setup.processes.size,
        ),
        flop_convention=FLOP_CONVENTION,
        flops_per_token=flops,
        peak=None if peak is None else _peak_facts(peak, device, COMPUTE_DTYPE[cfg.train.precision]),
        machine=machine_facts(device, setup.processes.size),
        versions=version_facts(),
        code=code_facts(),
        command=request.command,
        config=dump(cfg),
        **measured,
    )


def _peak_facts(peak: Peak, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    name = str(dtype).removeprefix("torch.")
    if peak.how == "measured":
        threads = torch.get_num_threads()
        product = f"the fastest {name} matrix product measured on this machine"
        source = f"{product} with {threads} thread{'s' * (threads > 1)}"
    else:
        source = f"the published dense {name} peak of {torch.cuda.get_device_name(device)}"
    return {"flops_per_s": peak.flops, "dtype": name, "how": peak.how, "source": source}
