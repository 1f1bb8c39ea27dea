"""The two norms, and the choice between them."""

import torch
from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain_kernels import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out = rms_norm(x, self.weight, self.eps)
        assert isinstance(out, Tensor)
        return out


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def make_norm(cfg: DecoderConfig) -> nn.Module:
    """The norm of a block."""
    kind = RMSNorm if cfg.norm == "rms" else LayerNorm
    return kind(cfg.hidden_size, cfg.norm_eps)
