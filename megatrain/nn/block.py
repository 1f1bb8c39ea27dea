"""One layer of a decoder: attention and feed-forward, each behind a norm and added to the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from megatrain.nn.attention import Attention, SequenceInfo
from megatrain.nn.config import DecoderConfig
from megatrain.nn.convolution import Convolution
from megatrain.nn.image_config import ConvolutionConfig
from megatrain.nn.mla import MultiHeadLatentAttention
from megatrain.nn.mlp import GatedMLP, PlainMLP, make_mlp
from megatrain.nn.moe import MoE
from megatrain.nn.norm import make_norm
from megatrain.nn.plan import block_weights, part_of

Body = Callable[[Tensor, SequenceInfo], Tensor]
Run = Callable[[Body, Tensor, SequenceInfo], Tensor]


Begin = Callable[[SequenceInfo], None]


def _mixer(cfg: DecoderConfig, layer: int) -> nn.Module:
    """Return the part of a block that mixes positions."""
    if isinstance(cfg, ConvolutionConfig):
        return Convolution(cfg)
    return (Attention if cfg.mla is None else MultiHeadLatentAttention)(cfg, cfg.window(layer))


def do_nothing(sequence: SequenceInfo) -> None:
    """Leave the parts of a block as they are before it computes."""


def run_body(body: Body, x: Tensor, sequence: SequenceInfo) -> Tensor:
    """Call a block's body and keep its activations for the backward pass."""
    return body(x, sequence)


class Block(nn.Module):
    """A pre-norm block, `(batch, seq, hidden)` to the same. It has either `mlp` or `moe`.

    `layer` is its index in the full model.
    """

    SEAMS = ("run", "begin")

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__()
        weights = block_weights(cfg, layer)
        self.scale = cfg.residual_scale
        self.attn_norm = make_norm(cfg, weights["attn_norm"])
        self.attn = _mixer(cfg, layer)
        self.mlp_norm = make_norm(cfg, weights["mlp_norm"])
        self.mlp: GatedMLP | PlainMLP | None = None
        self.moe: MoE | None = None
        if cfg.has_experts(layer):
            self.moe = MoE(cfg)
        else:
            self.mlp = make_mlp(cfg, part_of(weights, "mlp"))
        self.run: Run = run_body
        self.begin: Begin = do_nothing

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        return self.run(self.body, x, sequence)

    def body(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        """Add attention's and then the feed-forward block's output to the residual stream `x`."""
        self.begin(sequence)
        attended = self._scaled(self.attn(self.attn_norm(x), sequence))
        normed, x = self.mlp_norm(attended, residual=x)  # adds and normalizes in one
        feed_forward = self.moe if self.mlp is None else self.mlp
        assert feed_forward is not None
        return x + self._scaled(feed_forward(normed))

    def _scaled(self, update: Tensor) -> Tensor:
        return update if self.scale == 1 else update * self.scale
