"""How the work is cut over devices, and what is recomputed or compiled."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, config


@config
class ParallelConfig:
    """Degrees of each mesh axis. One process runs the whole model in this version, so each must be 1."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the model that see different data."""
    dp_shard: int = 1
    """Ranks over which parameters, gradients and optimizer states are sharded (ZeRO)."""
    cp: int = 1
    """Ranks over which a sequence is cut."""
    tp: int = 1
    """Ranks over which matrices are cut."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations made again in the backward pass: none; full: each block's; selective: all but the outputs of
    linear layers and fused attention."""
    compile: bool = False
    """torch.compile each block."""

    def problems(self) -> Iterator[Problem]:
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
            if getattr(self, axis) != 1:
                yield Problem(axis, getattr(self, axis), "this version trains in one process", (1,))
