"""How a run guards against what fails around it."""

from typing import Annotated, Literal

from megatrain.config.ranges import Count, Positive, Range
from megatrain.config.schema import config


@config
class ResilienceConfig:
    timeout_s: Annotated[float, Range(at_least=1, at_most=86400)] = 600.0
    """Seconds after which a process that waits for another one gives up, so that nothing stands still longer when one
    hangs; it need not cover what one process does alone (preparing data, checking a checkpoint), which may take as long
    as it computes. At the start processes wait for one another as long as the command line says, at least a minute."""
    non_finite: Literal["skip", "stop"] = "skip"
    """When the loss or the gradient norm of a step is not finite. skip: leave the weights as they are and go on with
    the next batch; stop: end the run. Engines that partition the optimizer always stop."""
    max_skips: Count = 3
    """Steps in a row that may be skipped; one more ends the run."""
    spike: Literal["ignore", "rollback"] = "ignore"
    """When the loss of a step is far above that of the steps before. rollback: go back to the latest checkpoint and
    pass over the batches since; a spike that follows the same checkpoint again ends the run."""
    spike_deviations: Positive = 10.0
    """A loss is a spike if it exceeds the median of the last 128 by this many times their deviation (1.4826 times the
    median absolute deviation, at least 1 % of the median)."""
    compare_replicas_every: Count = 0
    """Steps between comparisons of what several ranks hold alike (weights, optimizer states), which silent errors of
    hardware make differ; a difference ends the run and names tensor and rank. 0: never."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What to do before the first step if machines differ in code, versions, settings or data, or if one is unhealthy.
    refuse: end with exit code 2, naming the machine; warn: go on with a notice; off: check nothing but the data."""
    least_bandwidth: Annotated[float, Range(at_least=0, at_most=1)] = 0.3
    """Share of the median bandwidth of its kind that each link between machines, and each group of a parallel axis,
    must reach in the check before the first step of a run on several machines; 0: measure nothing."""
