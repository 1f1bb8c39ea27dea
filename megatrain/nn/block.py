"""One layer of a decoder: attention and feed-forward, each behind a norm and added to the residual stream."""

from torch import Tensor, nn

from megatrain.nn.attention import Attention, SequenceInfo
from megatrain.nn.config import DecoderConfig
from megatrain.nn.mla import MultiHeadLatentAttention
from megatrain.nn.mlp import make_mlp
from megatrain.nn.moe import MoE
from megatrain.nn.norm import make_norm


class Block(nn.Module):
    """`(batch, seq, hidden)` to the same. `layer` is its index in the whole model; it has either `mlp` or `moe`."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.scale = cfg.residual_scale
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg) if cfg.mla is None else MultiHeadLatentAttention(cfg)
        self.mlp_norm = make_norm(cfg)
        self.mlp = None if cfg.has_experts(layer) else make_mlp(cfg)
        self.moe = MoE(cfg) if cfg.has_experts(layer) else None

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        attended = self._scaled(self.attn(self.attn_norm(x), sequence))
        normed, x = self.mlp_norm(attended, residual=x)  # adds and normalises in one
        feed_forward = self.moe if self.mlp is None else self.mlp
        assert feed_forward is not None
        return x + self._scaled(feed_forward(normed))

    def _scaled(self, update: Tensor) -> Tensor:
        return update if self.scale == 1 else update * self.scale
