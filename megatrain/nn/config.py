"""The decoder Transformer's options; a family's config is this class with that family's defaults."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, config, nearest_divisors


@config
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained at."""

    kind: Literal["llama3", "yarn", "linear"] = "llama3"
    factor: float = 8.0
    """By how much the context grows."""
    original_max_seq_len: int = 8192
    """Tokens: the length before stretching."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_seq_len / low_freq_factor` are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_seq_len / high_freq_factor` are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original length are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None takes `0.1 ln(factor) + 1` (YaRN, arXiv 2309.00071, section 3.4)."""

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, 1, "factor", "original_max_seq_len")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                rule = f"must be above 0 and below {high} ({getattr(self, high):g})"
                yield Problem(low, getattr(self, low), rule)
        if self.attention_factor is not None and not self.attention_factor > 0:
            yield Problem(
                "attention_factor", self.attention_factor, "must be positive, or null for the formula"
            )


@config
class DecoderConfig:
    """A decoder-only Transformer (pre-norm). Sizes are counts, not bytes."""

    n_layers: int = 4
    hidden_size: int = 256
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / n_heads."""
    ffn_size: int = 1024
    """Width inside the feed-forward block."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's size."""
    max_seq_len: int = 2048
    """Tokens: the longest sequence; with learned positions also their number."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """relu2 is the square of ReLU (Primer, arXiv 2109.08668)."""
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    window: int | None = None
    """Sliding window: a token sees itself and the `window - 1` tokens before it; None: all."""
    attention_bias: bool = False
    """Bias in the query, key and value projections."""
    output_bias: bool = False
    """Bias in the attention's output projection."""
    mlp_bias: bool = False
    tie_embeddings: bool = True
    """The output head is the embedding."""
    logit_softcap: float | None = None
    """c: logits become c·tanh(logits / c) (Gemma 2, arXiv 2408.00118); None: off."""
    init_std: float = 0.02
    """Standard deviation of matrices and embeddings at initialization."""
    init_scaling: Literal["none", "depth"] = "depth"
    """depth: output projections of both blocks start at `init_std / sqrt(2 n_layers)` (GPT-2)."""
    residual_scale: float = 1.0
    """Factor on what each block adds to the residual stream."""
    embedding_scale: float = 1.0
    """Factor on the embedding's output (Gemma uses sqrt(hidden_size))."""

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.n_heads if self.head_dim is None else self.head_dim

    def problems(self) -> Iterator[Problem]:
        sizes = ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size", "vocab_size")
        broken = [
            *at_least(self, 1, *sizes, "max_seq_len", "window"),
            *at_least(self, 0, "init_std", "norm_eps"),
        ]
        yield from broken
        if broken:
            return
        if self.head_dim is None and self.hidden_size % self.n_heads:
            legal = nearest_divisors(self.hidden_size, self.n_heads)
            rule = f"must divide hidden_size ({self.hidden_size}) when head_dim is not set"
            yield Problem("n_heads", self.n_heads, rule, legal)
        elif self.positions == "rope" and self.head_size % 2:
            rule = "rotary positions turn pairs of dimensions, so the head size must be even"
            yield Problem("head_dim", self.head_size, rule, (self.head_size - 1, self.head_size + 1))
        if self.n_heads % self.kv_heads:
            legal = nearest_divisors(self.n_heads, self.kv_heads)
            rule = f"must divide n_heads ({self.n_heads}): each key head serves an equal group of query heads"
            yield Problem("n_kv_heads", self.kv_heads, rule, legal)
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            yield Problem("logit_softcap", self.logit_softcap, "must be positive, or null for none")
