"""The feed-forward block: gated (SwiGLU, GeGLU) or plain."""

from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.nn.config import GATED, DecoderConfig
from megatrain_kernels import geglu, swiglu

JOIN = {"swiglu": swiglu, "geglu": geglu}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)); silu by default, else tanh GELU."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool, activation: str = "swiglu") -> None:
        super().__init__()
        self.join = JOIN[activation]
        self.gate = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.up = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down = nn.Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.join(self.gate(x), self.up(x)))
        return out


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up = nn.Linear(cfg.hidden_size, cfg.ffn_size, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.ffn_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self._activate(self.up(x)))
        return out

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


def make_mlp(cfg: DecoderConfig) -> nn.Module:
    """The feed-forward block that `cfg.activation` asks for."""
    if cfg.activation in GATED:
        return GatedMLP(cfg.hidden_size, cfg.ffn_size, bias=cfg.mlp_bias, activation=cfg.activation)
    return PlainMLP(cfg)
