"""When checkpoints are written and how many stay."""

from collections.abc import Iterator

from megatrain.config.schema import Problem, at_least, config


@config
class CheckpointConfig:
    every: int = 100
    """Steps between two checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 3
    """Newest checkpoints that stay; 0: all."""
    verify: bool = True
    """Check every file's hash before a checkpoint is loaded (its size is always checked)."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 0, "every", "keep")
