"""How often checkpoints are written, how many are kept, and how strictly they are checked."""

from megatrain.config.paths import PathText
from megatrain.config.ranges import Count
from megatrain.config.schema import config


@config
class CheckpointConfig:
    every: Count = 100
    """Steps between checkpoints. The last step is always saved; 0: only that one."""
    keep: Count = 3
    """Number of most recent checkpoints to keep; 0: all."""
    adopt: PathText | None = None
    """Start from the weights of another run: its directory, or one of its checkpoints. Optimizer and data start anew; a
    run that has checkpoints of its own goes on from these."""
    verify: bool = True
    """Check the SHA-256 of every file before loading a checkpoint (file sizes are always checked)."""
