"""Self-attention with grouped key heads, rotary positions and an optional norm of queries and keys."""

from typing import NamedTuple

from torch import Tensor, nn

from megatrain.nn.config import DecoderConfig
from megatrain.nn.norm import RMSNorm
from megatrain_kernels import attention, rotary


class SequenceInfo(NamedTuple):
    """Where the tokens of a batch stand, computed once and shared by all layers."""

    cos: Tensor | None
    """`(seq, head_dim / 2)` or `(batch, seq, head_dim / 2)`; None without rotary positions."""
    sin: Tensor | None
    doc_ids: Tensor | None
    """`(batch, seq)`: a token sees its own document only; None: all."""


class AttentionCore(nn.Module):
    """The part of attention that mixes tokens: a seam that context parallelism may replace."""

    def __init__(self, sliding_window: int | None, scale: float | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.scale = scale
        """Factor on the scores; None: head_dim^(-1/2)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
        """q `(batch, seq, heads, head_dim)`, k and v with as many or fewer heads; `(batch, seq, heads, v_dim)`."""
        out = attention(q, k, v, scale=self.scale, window=self.sliding_window, doc_ids=doc_ids)
        assert isinstance(out, Tensor)
        return out


class Attention(nn.Module):
    """`(batch, seq, hidden)` to the same. Head counts come from the weights, so a shard of them works alone."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.qk_head_dim = cfg.qk_head_dim
        q_size, kv_size = cfg.n_heads * cfg.qk_head_dim, cfg.kv_heads * cfg.qk_head_dim
        self.wq = nn.Linear(cfg.hidden_size, q_size, bias=cfg.attention_bias)
        self.wk = nn.Linear(cfg.hidden_size, kv_size, bias=cfg.attention_bias)
        self.wv = nn.Linear(cfg.hidden_size, kv_size, bias=cfg.attention_bias)
        self.wo = nn.Linear(q_size, cfg.hidden_size, bias=cfg.output_bias)
        self.q_norm = RMSNorm(cfg.qk_head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.qk_head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.core = AttentionCore(cfg.sliding_window)

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        heads = (-1, self.qk_head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if sequence.cos is not None and sequence.sin is not None:
            q, k = rotary(q, k, sequence.cos, sequence.sin)
        out: Tensor = self.wo(self.core(q, k, v, sequence.doc_ids).flatten(-2))
        return out
