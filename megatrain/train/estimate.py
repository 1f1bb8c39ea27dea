"""Estimate of a measurement's time and memory, made before it starts."""

from dataclasses import dataclass

from megatrain.config.errors import UserError
from megatrain.models.flops import flops_per_token
from megatrain.parallel.layout import data_ranks, world_size
from megatrain.runtime.device import Peak
from megatrain.train.config import Config
from megatrain.train.micro_batch import activation_bytes, state_bytes

SHARE_OF_PEAK = (0.15, 0.7)
"""Range of the share of the peak that a step reaches (measured: 0.2 to 0.6; small models less)."""
PROCESS_GIB = 0.4
"""Memory in GiB of a process that has imported torch, which counts on a CPU."""
SOON_S = 10.0
"""Duration of a measurement below which it is not estimated: overheads that are not counted are as long."""
LONG_S = 600.0
"""Duration of a measurement from which on a shorter one is named."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What one process is expected to take, and to have."""

    step_s: tuple[float, float] | None
    """Seconds a step, the least and the most; None where the device's peak is unknown."""
    tflop: float
    """TFLOP of a step on each process, attention counted in full."""
    state_gib: float
    """Weights, gradients and optimizer state."""
    activations_gib: float
    """Values that one micro-batch keeps for the backward pass."""
    memory_gib: float
    """The memory that a process may fill."""

    @property
    def needed_gib(self) -> float:
        return self.state_gib + self.activations_gib


def estimate(cfg: Config, *, peak: Peak | None, memory: int, on_cpu: bool) -> Estimate:
    """Estimate a step of `cfg`, whose layout and `auto` values are resolved.

    Args:
        peak: the FLOP/s of one process. memory: the bytes that one process may fill.
    """
    precision = cfg.train.precision
    tokens = cfg.global_batch_size * cfg.seq_len / world_size(cfg.parallel)
    flops = tokens * flops_per_token(cfg.model, cfg.seq_len, causal=False)
    state = state_bytes(cfg.model, cfg.parallel, cfg.optim, precision=precision)
    sequence = activation_bytes(cfg.model, cfg.parallel, cfg.seq_len, precision=precision)
    return Estimate(
        step_s=None
        if peak is None
        else (flops / peak.flops / SHARE_OF_PEAK[1], flops / peak.flops / SHARE_OF_PEAK[0]),
        tflop=flops / 1e12,
        state_gib=state / GIB + PROCESS_GIB * on_cpu,
        activations_gib=sequence * cfg.resolved_micro_batch_size / GIB,
        memory_gib=memory / GIB,
    )


def describe(found: Estimate, cfg: Config, *, steps: int) -> list[str]:
    """Return the estimate as lines: time of a step and of `steps` of them, and memory."""
    rows = cfg.global_batch_size // data_ranks(cfg.parallel)
    micro_batches = rows // cfg.resolved_micro_batch_size
    tokens = f"{cfg.resolved_micro_batch_size} x {cfg.seq_len} tokens"
    size = f"{micro_batches} micro-batch{'es' * (micro_batches > 1)} of {tokens}"
    each = " on each process" if world_size(cfg.parallel) > 1 else ""
    lines = [f"Estimate: {_tflop(found.tflop)} a step{each} ({size})"]
    if found.step_s is not None:
        low, high = (steps * each_step for each_step in found.step_s)
        lines[0] += (
            f", a few seconds in all for {steps} steps"
            if high < SOON_S
            else f", {_seconds(low / steps)} to {_seconds(high / steps)} a step, {_seconds(low)} to {_seconds(high)} "
            f"in all for {steps} steps"
        )
        if low > LONG_S and micro_batches > 1:
            one = cfg.resolved_micro_batch_size * data_ranks(cfg.parallel)
            lines.append(
                f"With global_batch_size={one}, one micro-batch a step, it takes {_seconds(low / micro_batches)} to "
                f"{_seconds(high / micro_batches)}, and tokens/s differ only by the optimizer's part"
            )
    lines.append(
        f"Estimate: {found.needed_gib:.2f} of {found.memory_gib:.1f} GiB{each}: weights, gradients and optimizer "
        f"{found.state_gib:.2f}, activations {found.activations_gib:.2f}"
    )
    return lines


def require_room(found: Estimate) -> None:
    """Refuse a measurement whose estimate exceeds the memory.

    Raises:
        UserError: it does.
    """
    if found.needed_gib > found.memory_gib:
        raise UserError(
            f"out of memory before it starts: about {found.needed_gib:.1f} GiB are needed by each process (weights, "
            f"gradients and optimizer {found.state_gib:.1f}, activations of one micro-batch "
            f"{found.activations_gib:.1f}), and it has {found.memory_gib:.1f}. Set micro_batch_size=1 or "
            "parallel.activation_checkpointing=full for fewer activations, parallel.dp_shard, tp or pp for fewer "
            "weights on each device, or model.n_layers for a part of the model. --force measures all the same."
        )


def _tflop(value: float) -> str:
    """Return an amount of work with its unit, to three digits."""
    unit, size = ("PFLOP", 1e3) if value >= 1e3 else ("TFLOP", 1.0) if value >= 1 else ("GFLOP", 1e-3)
    return f"{float(f'{value / size:.3g}'):,g} {unit}"


def _seconds(value: float) -> str:
    """Return a duration with its unit, to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{float(f'{value / size:.2g}'):g} {unit}"
    return f"{float(f'{value:.2g}'):g} s" if value >= 1 else f"{float(f'{value * 1e3:.2g}'):g} ms"
