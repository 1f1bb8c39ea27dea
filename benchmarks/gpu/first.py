"""The most important figures, timed before all others: long causal attention, and training on packed documents."""

from benchmarks.gpu import speed, training
from benchmarks.gpu.steps import Setting, Step


def steps(setting: Setting) -> list[Step]:
    """List what `speed` and `training` call important; the rows are theirs."""
    return speed.important_steps(setting) + training.important_steps(setting)
