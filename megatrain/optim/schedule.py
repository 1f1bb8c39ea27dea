"""The learning rate of each step, as a pure function of the step."""

import math

from megatrain.optim.config import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig


def lr_factor(cfg: ScheduleConfig, step: int, *, total_steps: int) -> float:
    """Return the share of the peak learning rate that step `step` (the first is 0) uses.

    Warm-up grows linearly and reaches 1 at the step after it; its first step is not 0. The last step,
    `total_steps - 1`, uses the schedule's final ratio.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if isinstance(cfg, ConstantConfig):
        return 1.0
    if isinstance(cfg, CosineConfig | LinearConfig):
        done = _progress(step, warmup, total_steps - 1)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if isinstance(cfg, CosineConfig) else 1 - done
    else:
        decay_start = max(warmup, round(total_steps * (1 - cfg.decay_fraction)) - 1)
        shape = 1 - _progress(step, decay_start, total_steps - 1)
    return cfg.final_ratio + (1 - cfg.final_ratio) * shape


def warmup_steps(cfg: ScheduleConfig, total_steps: int) -> int:
    """Return the number of warm-up steps, with `auto` resolved for a run of `total_steps`."""
    if cfg.warmup_steps != "auto":
        return cfg.warmup_steps
    if cfg.warmup_fraction is None:
        return min(100, total_steps // 10)
    return round(cfg.warmup_fraction * total_steps)


def _progress(step: int, start: int, end: int) -> float:
    """Return how far `step` is from `start` (0) to `end` (1)."""
    if step >= end:
        return 1.0 if end > start else 0.0
    return max(0.0, (step - start) / (end - start))
