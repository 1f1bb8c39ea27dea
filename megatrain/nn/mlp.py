"""The feed-forward block: gated (SwiGLU, GeGLU) or plain."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.nn.config import GATED, DecoderConfig
from megatrain.nn.contract import Weight
from megatrain.nn.joined import Products, joined_products
from megatrain.nn.layer import Linear
from megatrain_kernels import bias_gelu, geglu, swiglu

GATES = {"swiglu": swiglu, "geglu": geglu}
PRODUCT_ADDS_BIAS = ("cpu",)
"""Devices on which a product adds the bias faster than the activation does."""


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)), `(..., hidden)` to the same."""

    SEAMS = ("products",)
    products: Products = staticmethod(joined_products)

    def __init__(self, weights: Mapping[str, Weight], activation: str = "swiglu") -> None:
        super().__init__()
        self.join = GATES[activation]
        self.gate, self.up, self.down = (Linear(weights[name]) for name in ("gate", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.join(*self.products(x, (self.gate, self.up))))
        return out


class PlainMLP(nn.Module):
    """down(activation(up(x))), `(..., hidden)` to the same."""

    def __init__(self, weights: Mapping[str, Weight], activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = Linear(weights["up"]), Linear(weights["down"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self._activated(x))
        return out

    def _activated(self, x: Tensor) -> Tensor:
        if self.activation == "relu2":
            inner: Tensor = self.up(x)
            return F.relu(inner).square()
        tanh = self.activation == "gelu_tanh"
        if self.up.bias is not None and x.device.type not in PRODUCT_ADDS_BIAS:
            return bias_gelu(self.up(x, biased=False), self.up.tensor("bias"), tanh=tanh)
        return F.gelu(self.up(x), approximate="tanh" if tanh else "none")


def make_mlp(cfg: DecoderConfig, weights: Mapping[str, Weight]) -> GatedMLP | PlainMLP:
    """Return the feed-forward block that `cfg.activation` asks for."""
    kind = GatedMLP if cfg.activation in GATED else PlainMLP
    return kind(weights, cfg.activation)
