"""How often checkpoints are written, how many are kept, and how strictly they are checked."""

from collections.abc import Iterator

from megatrain.config.schema import Problem, at_least, config


@config
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints. The last step is always saved; 0: only that one."""
    keep: int = 3
    """Number of most recent checkpoints to keep; 0: all."""
    verify: bool = True
    """Check the SHA-256 of every file before loading a checkpoint (file sizes are always checked)."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 0, "every", "keep")
