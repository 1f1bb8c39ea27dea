"""How a run guards against what fails around it."""

from typing import Annotated

from megatrain.config.ranges import Range
from megatrain.config.schema import config


@config
class ResilienceConfig:
    timeout_s: Annotated[float, Range(at_least=1, at_most=86400)] = 600.0
    """Seconds after which a process that waits for another one gives up, so that nothing stands still longer when one
    hangs; it need not cover what one process does alone (preparing data, checking a checkpoint), which may take as long
    as it computes."""
