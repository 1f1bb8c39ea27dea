"""How often checkpoints are written, how many are kept, and how strictly they are checked."""

from collections.abc import Iterator

from megatrain.config.schema import Problem, at_least, config


@config
class CheckpointConfig:
    every: int = 100
    """Steps between two checkpoints; 0: only the last step, which is always saved."""
    keep: int = 3
    """Number of newest checkpoints that are kept; 0: all."""
    verify: bool = True
    """Check the SHA-256 of every file before a checkpoint is loaded (sizes are always checked)."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 0, "every", "keep")
