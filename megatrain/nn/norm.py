"""The two norms, and the choice between them.

Both take a residual on request: then it is added first, and (norm of the sum, sum) is returned.
"""

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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x and residual `(..., size)`."""
        return rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x and residual `(..., size)`."""
        total = x if residual is None else x + residual
        out = layer_norm(total, self.weight, self.bias, self.eps)
        return out if residual is None else (out, total)


def make_norm(cfg: DecoderConfig) -> nn.Module:
    """The norm of a block."""
    kind = RMSNorm if cfg.norm == "rms" else LayerNorm
    return kind(cfg.hidden_size, cfg.norm_eps)
