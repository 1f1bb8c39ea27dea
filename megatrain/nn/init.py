"""Initial weights: each element a pure function of (seed, canonical parameter name, its global index)."""

import math

import torch
from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain.runtime.rng import fill_normal_

BLOCK_OUTPUTS = ("attn.wo.weight", "mlp.down.weight")


def parameter_std(name: str, cfg: DecoderConfig) -> float:
    """Standard deviation of a matrix at initialization."""
    if cfg.init_scaling == "depth" and name.endswith(BLOCK_OUTPUTS):
        return cfg.init_std / math.sqrt(2 * cfg.n_layers)
    return cfg.init_std


@torch.no_grad()
def init_parameter_(
    out: Tensor, name: str, cfg: DecoderConfig, *, seed: int, indices: Tensor | None = None
) -> None:
    """Fill one parameter, or the part of it whose elements have the global (row-major) `indices`.

    Matrices are normal, norms 1, biases 0.
    """
    if name.endswith("bias"):
        out.zero_()
    elif name.endswith("norm.weight"):
        out.fill_(1.0)
    else:
        fill_normal_(out, seed=seed, name=name, std=parameter_std(name, cfg), indices=indices)


def init_weights(model: nn.Module, cfg: DecoderConfig, *, seed: int) -> None:
    """Fill all parameters of `model`, each on the device where it is."""
    for name, parameter in model.named_parameters():
        init_parameter_(parameter.data, name, cfg, seed=seed)
