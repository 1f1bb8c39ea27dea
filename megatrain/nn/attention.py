"""Self-attention with grouped key and value heads, rotary positions and an optional norm of queries and keys."""

from typing import NamedTuple

from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain.nn.joined import Products, joined_products
from megatrain.nn.layer import Linear
from megatrain.nn.norm import RMSNorm
from megatrain.nn.plan import attention_weights
from megatrain_kernels import attention, rotary


class SequenceInfo(NamedTuple):
    """Positions and documents of the tokens in a batch, computed once and shared by all layers."""

    cos: Tensor | None
    """`(seq, head_dim / 2)` or `(batch, seq, head_dim / 2)`; None without rotary positions."""
    sin: Tensor | None
    doc_ids: Tensor | None
    """`(batch, seq)`: a token attends to its own document only; None: each row is one document."""
    token_numbers: Tensor | None = None
    """`(batch, seq)` int64: each token's number in the run, which draws are keyed by; None: nothing is drawn."""


class AttentionCore(nn.Module):
    """The part of attention that mixes tokens. Context parallelism replaces it."""

    def __init__(
        self, sliding_window: int | None, scale: float | None = None, *, causal: bool = True
    ) -> None:
        super().__init__()
        self.causal = causal
        self.sliding_window = sliding_window
        self.scale = scale
        """Factor on the scores; None: head_dim^(-1/2)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Attend, causally or to all tokens; returns `(batch, seq, heads, v_dim)`.

        Args:
            q: `(batch, seq, heads, head_dim)`.
            k, v: as many or fewer heads, each of which serves an equal group of query heads.
            doc_ids: `(batch, seq)`; None: every row is one document.
        """
        out = attention(
            q, k, v, causal=self.causal, scale=self.scale, window=self.sliding_window, doc_ids=doc_ids
        )
        assert isinstance(out, Tensor)
        return out


class Attention(nn.Module):
    """Grouped-query attention, `(batch, seq, hidden)` to the same.

    Head counts come from the weights, so a shard of the heads works alone. `sliding_window` is the layer's.
    """

    SEAMS = ("core", "products")
    products: Products = staticmethod(joined_products)

    def __init__(self, cfg: DecoderConfig, sliding_window: int | None) -> None:
        super().__init__()
        weights = attention_weights(cfg)
        self.head_dim = cfg.qk_head_dim
        self.wq, self.wk, self.wv, self.wo = (Linear(weights[name]) for name in ("wq", "wk", "wv", "wo"))
        self.q_norm = RMSNorm(weights["q_norm"], cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(weights["k_norm"], cfg.norm_eps) if cfg.qk_norm else None
        self.core: nn.Module = AttentionCore(sliding_window, causal=cfg.is_causal)

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        heads = (-1, self.head_dim)
        made = self.products(x, (self.wq, self.wk, self.wv))
        q, k, v = (each.unflatten(-1, heads) for each in made)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if sequence.cos is not None and sequence.sin is not None:
            q, k = rotary(q, k, sequence.cos, sequence.sin)
        out: Tensor = self.wo(self.core(q, k, v, sequence.doc_ids).flatten(-2))
        return out
