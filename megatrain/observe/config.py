"""Logging config: what is displayed and recorded. metrics.jsonl and events.jsonl are always written."""

from typing import Literal

from megatrain.config.ranges import Count, PositiveCount
from megatrain.config.schema import config


@config
class LogConfig:
    every: PositiveCount = 1
    """Steps between rows of metrics.jsonl and updates of the display; times and rates are averaged over these steps."""
    fingerprints_every: Count = 0
    """Steps between rows of fingerprints.jsonl: norm and projection of gradients and weights of each part of the model,
    by which `megatrain diff` finds where two runs part, in any layouts. They cost a pass over both. 0: none."""
    display: Literal["auto", "live", "plain", "off"] = "auto"
    """Terminal output. auto: a live table on a terminal, plain lines elsewhere."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases logging. offline: stored in the run directory, to be synced later."""
    wandb_project: str = "megatrain"
    """Weights & Biases project name."""
    tensorboard: bool = False
    """Also write TensorBoard event files (`make extras` installs what it needs)."""
