"""The one order in which techniques are applied around a model."""

from torch import nn

from megatrain.parallel.compile import compile_blocks
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.recompute import recompute_blocks


def parallelize(model: nn.Module, cfg: ParallelConfig) -> None:
    """Change `model` in place: recomputation inside, compilation around it."""
    recompute_blocks(model, cfg.recompute)
    if cfg.compile:
        compile_blocks(model)
