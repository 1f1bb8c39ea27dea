"""Short warnings where a measurement does not tell what it seems to, each with its reason and what to do."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatrain.observe.profile import OPTIMIZER, OUTSIDE, OUTSIDE_ON_GPU, Breakdown
from megatrain.train.config import Config

FEW_STEPS = 5
WIDE_SPREAD = 0.3
"""Distance from the fastest to the slowest step, as a share of the median, beyond which the median is unsteady."""
MUCH_OVERHEAD = 0.3
"""Share of a step outside operators, or in the optimizer, beyond which the model or the batch is too small."""
PAYS_IN_FP8 = 4096
"""Hidden size below which fp8 was slower than bf16 where it was measured: docs/gpus.md, on an H100."""
BUSY = 0.3
"""Cores kept busy by others that are worth a warning."""


@dataclass(frozen=True)
class Circumstances:
    """What the warnings are about, beside the config."""

    times: list[float]
    """Seconds of each measured step."""
    profile: Breakdown
    on_cpu: bool
    threads: int
    """Threads of each process."""
    processes: int
    """Processes on this machine."""
    cores: int
    """Cores that they may use."""
    others: float
    """Cores that other processes kept busy."""
    flags: list[str]
    """Debug settings that slow training down."""
    fits_without_checkpointing: bool
    preset_seq_len: int | None
    """The sequence length of the model's recipe, where another one is measured."""


def notes(cfg: Config, seen: Circumstances) -> list[str]:
    """Return the warnings that apply."""
    return [*_about_machine(seen), *_about_steps(seen), *_about_config(cfg, seen)]


def _about_machine(seen: Circumstances) -> Iterator[str]:
    used = seen.threads * seen.processes
    if seen.on_cpu and used < seen.cores:
        yield (
            f"{used} of {seen.cores} cores are used: set OMP_NUM_THREADS={max(1, seen.cores // seen.processes)} "
            "to use all"
        )
    if seen.on_cpu and used > seen.cores:
        yield (
            f"{seen.processes} processes of {seen.threads} threads share {seen.cores} cores, so they slow each other "
            "down: this tells nothing of separate devices"
        )
    if seen.others > BUSY:
        yield f"other processes kept {seen.others:.1f} cores busy meanwhile: measure on an idle machine"
    if seen.flags:
        yield f"debug settings slow this down: {', '.join(seen.flags)}"


def _about_steps(seen: Circumstances) -> Iterator[str]:
    times = sorted(seen.times)
    if len(times) < FEW_STEPS:
        yield f"a median of {len(times)} is unsteady: --steps {FEW_STEPS} or more"
    elif times[-1] - times[0] > WIDE_SPREAD * times[len(times) // 2]:
        yield (
            f"steps took {times[0] * 1e3:.0f} to {times[-1] * 1e3:.0f} ms: compare nothing closer than that, or "
            "measure more steps (--steps)"
        )


def _about_config(cfg: Config, seen: Circumstances) -> Iterator[str]:
    classes, total = dict(seen.profile.classes), seen.profile.step_time_s
    idle = classes.get(OUTSIDE, 0.0) + classes.get(OUTSIDE_ON_GPU, 0.0)
    tokens = cfg.resolved_micro_batch_size * cfg.seq_len
    if idle > MUCH_OVERHEAD * total:
        yield (
            f"{idle / total:.0%} of the step is Python between operators, not computing: a hidden size of "
            f"{cfg.model.hidden_size} and {tokens} tokens a micro-batch are too little for this device, and a larger "
            "model's MFU can't be told from it"
        )
    if classes.get(OPTIMIZER, 0.0) > MUCH_OVERHEAD * total:
        yield (
            f"the optimizer takes {classes[OPTIMIZER] / total:.0%}, since a step has only "
            f"{cfg.global_batch_size * cfg.seq_len} tokens: a larger global_batch_size spreads it"
        )
    if cfg.train.precision == "fp8" and not seen.on_cpu and cfg.model.hidden_size < PAYS_IN_FP8:
        yield (
            f"train.precision=fp8 was slower than bf16 on an H100 with hidden sizes of 768 and 2048, and this one is "
            f"{cfg.model.hidden_size}: measure train.precision=bf16 too"
        )
    kind = cfg.parallel.activation_checkpointing
    if kind != "none" and seen.fits_without_checkpointing:
        yield (
            f"parallel.activation_checkpointing={kind} recomputes although a micro-batch of "
            f"{cfg.resolved_micro_batch_size} is estimated to fit without: none is faster"
        )
    if seen.preset_seq_len is not None and cfg.seq_len < seen.preset_seq_len / 2:
        yield (
            f"seq_len={cfg.seq_len} is far below the preset's {seen.preset_seq_len}, so attention has a smaller part "
            "in the figures than in its runs"
        )
