"""Learning-rate schedules, as pure functions of the step: a linear warm-up and a shape after it.

A new schedule is a class here, a member of `ScheduleConfig`, and a file in `conf/schedule/`.
"""

import math
from typing import Annotated, Literal

from megatrain.config.ranges import Count, Fraction, Range
from megatrain.config.schema import config


@config
class WarmupConfig:
    """Options common to all learning-rate schedules: a linear warm-up to the peak."""

    kind: str = ""
    warmup_steps: Count | Literal["auto"] = "auto"
    """Steps of linear warm-up from 0 to the peak; auto: follows from `warmup_fraction`."""
    warmup_fraction: Fraction | None = None
    """Fraction of all steps that `warmup_steps=auto` stands for; null: 0.1, but at most 100 steps."""

    def factor(self, step: int, total_steps: int) -> float:
        """Return the learning rate of step `step` (the first is 0) of `total_steps` as a fraction of the peak.

        The first step of the warm-up is not 0, and the step after the warm-up uses the peak.
        """
        warmup = self.resolved_warmup(total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup(step, warmup, total_steps)

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return the fraction of the peak at `step` >= `warmup`."""
        raise NotImplementedError

    def resolved_warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps, with `auto` resolved for a run of `total_steps`."""
        if self.warmup_steps != "auto":
            return self.warmup_steps
        if self.warmup_fraction is None:
            return min(100, total_steps // 10)
        return round(self.warmup_fraction * total_steps)


@config
class ConstantConfig(WarmupConfig):
    """Constant at the peak after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Count | Literal["auto"] = 0
    """Steps of linear warm-up from 0 to the peak; auto: follows from `warmup_fraction`."""

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return 1."""
        return 1.0


@config
class CosineConfig(WarmupConfig):
    """Cosine decay from the peak to `final_ratio` of it (SGDR, arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    final_ratio: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return the cosine's value; the last step has `final_ratio`."""
        done = _progress(step, warmup, total_steps - 1)
        return _between(self.final_ratio, 0.5 * (1 + math.cos(math.pi * done)))


@config
class LinearConfig(WarmupConfig):
    """Linear decay from the peak to `final_ratio` of it."""

    kind: Literal["linear"] = "linear"
    final_ratio: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return the line's value; the last step has `final_ratio`."""
        return _between(self.final_ratio, 1 - _progress(step, warmup, total_steps - 1))


@config
class WSDConfig(WarmupConfig):
    """Warm-up, stable, decay (WSD; MiniCPM, arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: Annotated[float, Range(above=0, at_most=1)] = 0.2
    """Fraction of all steps, at the end, in which the learning rate decays linearly; at least one step."""
    final_ratio: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return 1 until the decay, then the line's value; the last step has `final_ratio`."""
        start = max(warmup, min(round(total_steps * (1 - self.decay_fraction)) - 1, total_steps - 2))
        return _between(self.final_ratio, 1 - _progress(step, start, total_steps - 1))


ScheduleConfig = ConstantConfig | CosineConfig | LinearConfig | WSDConfig


def _between(low: float, share: float) -> float:
    """Return the point that lies `share` of the way from `low` to 1."""
    return low + (1 - low) * share


def _progress(step: int, start: int, end: int) -> float:
    """Return how far `step` is from `start` (0) to `end` (1)."""
    if step >= end:
        return 1.0 if end > start else 0.0
    return max(0.0, (step - start) / (end - start))
