"""The two norms, and the choice between them.

Both take a residual on request: then it is added first, and (norm of the sum, sum) is returned.
"""

import torch
from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain.nn.contract import Weight
from megatrain.nn.layer import Layer
from megatrain_kernels import layer_norm, rms_norm


class RMSNorm(Layer):
    """RMSNorm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, weight: Weight, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(weight.shape))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize `x` `(..., size)`; `residual` has its shape."""
        return rms_norm(x, self.tensor("weight"), self.eps, residual)


class LayerNorm(Layer):
    """LayerNorm over the last dimension, with bias (arXiv 1607.06450)."""

    def __init__(self, weight: Weight, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(weight.shape))
        self.bias = nn.Parameter(torch.zeros(weight.shape))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize `x` `(..., size)`; `residual` has its shape."""
        return layer_norm(x, self.tensor("weight"), self.tensor("bias"), self.eps, residual)


def make_norm(cfg: DecoderConfig, weight: Weight) -> RMSNorm | LayerNorm:
    """Return a norm over the residual stream, of the kind that `cfg.norm` names."""
    kind = RMSNorm if cfg.norm == "rms" else LayerNorm
    return kind(weight, cfg.norm_eps)
