"""Initial weights: each element a pure function of (seed, canonical parameter name, its global index)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.nn.config import DecoderConfig
from megatrain.nn.contract import Plan, Role
from megatrain.nn.decoder import Decoder
from megatrain.runtime.rng import fill_normal_


class Shard(NamedTuple):
    """The rectangular shard of a parameter that this rank holds."""

    values: Tensor
    """Values of the shard."""
    shape: Sequence[int]
    """Shape of the full parameter."""
    offsets: Sequence[int]
    """Index in the full parameter at which `values` begins."""


def unsharded(name: str, parameter: Tensor) -> Shard:
    """Return the full parameter as its own shard."""
    return Shard(parameter.data, parameter.shape, (0,) * parameter.ndim)


def initial_std(role: Role, cfg: DecoderConfig) -> float:
    """Return the standard deviation of a matrix of that role at initialization."""
    if cfg.init_scaling == "depth" and role & Role.BRANCH_OUTPUT:
        return cfg.init_std / math.sqrt(2 * cfg.n_layers)
    return cfg.init_std


@torch.no_grad()
def init_weights(
    model: Decoder, plan: Plan, *, seed: int, shard_of: Callable[[str, Tensor], Shard] = unsharded
) -> None:
    """Fill all of `model`, each part where it is: matrices normal, norms 1, biases, buffers and adapters' outputs 0.

    Args:
        plan: plan of the full model, of which `model` may be a stage.
        shard_of: returns the shard of a parameter, given its name too, that this rank holds; default: all of it.

    Raises:
        KeyError: the plan has no parameter of a name that the model has.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        values, shape, offsets = shard_of(name, parameter)
        role = plan.roles[name]
        if name.endswith("bias"):
            values.zero_()
        elif role & Role.NORM:
            values.fill_(1.0)
        elif role & Role.ADAPTER_UP:
            values.zero_()
        else:
            # An adapter's first matrix has the variance of the usual uniform one, in ±1/sqrt(in).
            std = (3 * shape[-1]) ** -0.5 if role & Role.ADAPTER_DOWN else initial_std(role, model.cfg)
            fill_normal_(values, seed=seed, name=name, std=std, shape=shape, offsets=offsets)
