"""Initial weights: each element a pure function of (seed, canonical parameter name, its global index)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain.runtime.rng import fill_normal_

BLOCK_OUTPUTS = ("attn.wo.weight", "mlp.down.weight", "moe.experts.down", "moe.shared.down.weight")


class Shard(NamedTuple):
    """The rectangular part of a parameter that is at hand."""

    values: Tensor
    """What to fill."""
    shape: Sequence[int]
    """Of the whole parameter."""
    offsets: Sequence[int]
    """Where `values` begins in it."""


def whole(parameter: Tensor) -> Shard:
    """All of a parameter."""
    return Shard(parameter.data, parameter.shape, (0,) * parameter.ndim)


def parameter_std(name: str, cfg: DecoderConfig) -> float:
    """Standard deviation of a matrix at initialization."""
    if cfg.init_scaling == "depth" and name.endswith(BLOCK_OUTPUTS):
        return cfg.init_std / math.sqrt(2 * cfg.n_layers)
    return cfg.init_std


@torch.no_grad()
def init_weights(
    model: nn.Module, cfg: DecoderConfig, *, seed: int, shard_of: Callable[[Tensor], Shard] = whole
) -> None:
    """Fill all of `model`, each on the device where it is: matrices normal, norms 1, biases and buffers 0.

    `shard_of` tells which part of a parameter is held here, when it is not the whole.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        values, shape, offsets = shard_of(parameter)
        if name.endswith("bias"):
            values.zero_()
        elif name.endswith("norm.weight"):
            values.fill_(1.0)
        else:
            std = parameter_std(name, cfg)
            fill_normal_(values, seed=seed, name=name, std=std, shape=shape, offsets=offsets)
