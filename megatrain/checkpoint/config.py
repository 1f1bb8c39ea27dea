"""How often checkpoints are written, how many are kept, and how strictly they are checked."""

from megatrain.config.ranges import Count
from megatrain.config.schema import config


@config
class CheckpointConfig:
    every: Count = 100
    """Steps between checkpoints. The last step is always saved; 0: only that one."""
    keep: Count = 3
    """Number of most recent checkpoints to keep; 0: all."""
    verify: bool = True
    """Check the SHA-256 of every file before loading a checkpoint (file sizes are always checked)."""
