"""What is shown and recorded. metrics.jsonl and events.jsonl are always written."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, config


@config
class LogConfig:
    every: int = 1
    """Steps between two rows of metrics.jsonl and two updates of the display; times and rates are means of them."""
    display: Literal["auto", "live", "plain", "off"] = "auto"
    """auto: a live table on a terminal, plain lines elsewhere."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases; offline runs are kept in the run directory, to be synced later."""
    wandb_project: str = "megatrain"
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `tensorboard`)."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 1, "every")
