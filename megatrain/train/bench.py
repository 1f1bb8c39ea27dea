"""Measure how fast a config trains on this machine, and where a step's time goes. Nothing is written."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatrain.data.prepare import prepare
from megatrain.models.flops import flops_per_token, n_params
from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.profile import breakdown
from megatrain.parallel.layout import layout_summary
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.device import choose_precision, memory_bytes, peak_flops, pick_device
from megatrain.runtime.processes import Processes
from megatrain.train.auto import resolve_auto
from megatrain.train.build import COMPUTE_DTYPE, build_loader, build_state, with_layout
from megatrain.train.config import Config
from megatrain.train.step import train_step

WARM_UP = 3  # steps that are not measured: allocators and libraries initialize


@dataclass(frozen=True)
class BenchResult:
    """Medians over the measured steps, and seconds of one step by class of operation."""

    device: str
    precision: str
    layout: str
    parameters: int
    steps: int
    step_time_s: float
    spread_s: tuple[float, float]
    """Duration of the fastest and the slowest measured step, in seconds."""
    rates: dict[str, float]
    """Tokens/s, TFLOP/s and MFU by their names in metrics.jsonl."""
    peak_source: str | None
    """Source of the peak FLOP/s behind MFU: "published", "measured", or None if unknown."""
    peak_memory_gib: float
    classes: list[tuple[str, float]]
    operators: list[tuple[str, float]]


def bench(
    cfg: Config, processes: Processes, *, steps: int, progress: Callable[[str, float], None]
) -> BenchResult:
    """Time `steps` training steps of `cfg` on its own data; memory and operations are those of the first process.

    Raises:
        UserError: the data is invalid or too short.
    """
    cfg = with_layout(cfg, processes.size)
    device = pick_device(processes.local_rank)
    if cfg.train.precision == "auto":
        precision = processes.from_first(lambda: choose_precision(device))
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
    cfg = processes.from_first(lambda: resolve_auto(cfg, memory=memory_bytes(device, processes.local_size)))
    data = processes.agree(lambda: prepare(cfg.data, progress=progress, vocab_size=cfg.model.vocab_size))
    mesh = make_mesh(cfg.parallel, device) if processes.size > 1 else None
    state, batches = build_state(cfg, device, mesh), build_loader(cfg, data.train, mesh).batches(0)

    def step() -> None:
        train_step(state, next(batches), cfg, lr=0.0).read()  # waits for the device

    reset_peak_memory(device)
    times: list[float] = []
    for number in range(WARM_UP + steps):
        progress("measuring steps", number / (WARM_UP + steps))
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    counted = times[WARM_UP:]
    memory = peak_memory_gib(device)
    classes, operators = breakdown(step)
    batches.close()  # type: ignore[attr-defined]
    peak = peak_flops(device, COMPUTE_DTYPE[cfg.train.precision])
    rates = throughput(
        cfg.global_batch_size * cfg.seq_len,
        statistics.median(counted),
        flops_per_token_full=flops_per_token(cfg.model, cfg.seq_len, causal=False),
        flops_per_token_causal=flops_per_token(cfg.model, cfg.seq_len, causal=True),
        peak=peak,
        devices=processes.size,
    )
    return BenchResult(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        precision=cfg.train.precision,
        layout=layout_summary(cfg.parallel),
        parameters=n_params(cfg.model),
        steps=steps,
        step_time_s=statistics.median(counted),
        spread_s=(min(counted), max(counted)),
        rates=rates,
        peak_source=None if peak is None else peak.how,
        peak_memory_gib=memory,
        classes=classes,
        operators=operators,
    )
