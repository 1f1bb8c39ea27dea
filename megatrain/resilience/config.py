"""How a run guards against what fails around it."""

from typing import Annotated, Literal

from megatrain.config.ranges import Range
from megatrain.config.schema import config


@config
class ResilienceConfig:
    timeout_s: Annotated[float, Range(at_least=1, at_most=86400)] = 600.0
    """Seconds after which a process that waits for another one gives up, so that nothing stands still longer when one
    hangs; it need not cover what one process does alone (preparing data, checking a checkpoint), which may take as long
    as it computes. At the start processes wait for one another as long as the command line says, at least a minute."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What to do before the first step if machines differ in code, versions, settings or data, or if one is unhealthy.
    refuse: end with exit code 2, naming the machine; warn: go on with a notice; off: check nothing but the data."""
    least_bandwidth: Annotated[float, Range(at_least=0, at_most=1)] = 0.3
    """Share of the median bandwidth of its kind that each link between machines, and each group of a parallel axis,
    must reach in the check before the first step of a run on several machines; 0: measure nothing."""
