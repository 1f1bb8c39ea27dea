"""The decoder Transformer's options; a family's config is this class with that family's defaults."""

from collections.abc import Iterator
from typing import Literal

from megatrain.config.schema import Problem, at_least, config, nearest_divisors

GATED = ("swiglu", "geglu")
"""Activations that take a gate beside their input."""


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
    """yarn: factor on cos and sin; null takes `0.1 ln(factor) + 1` (YaRN, arXiv 2309.00071, section 3.4)."""
    mscale: float | None = None
    """yarn in latent attention: scores are multiplied by `(0.1 mscale ln(factor) + 1)²`, and cos and sin are left as
    they are (DeepSeek-V2's published code); null: as `attention_factor` says."""

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
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): sizes of its vectors and heads."""

    q_lora_rank: int | None = 1536
    """Queries are made from a normed vector of this size; null: from the hidden state."""
    kv_lora_rank: int = 512
    """Keys and values of all heads are made from one normed vector of this size."""
    qk_nope_head_dim: int = 128
    """The part of each query and key head without position."""
    qk_rope_head_dim: int = 64
    """The part with rotary positions; that of the keys is shared by all heads."""
    v_head_dim: int = 128

    def problems(self) -> Iterator[Problem]:
        sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        yield from at_least(self, 1, *sizes)
        size = self.qk_rope_head_dim
        if size % 2:
            yield Problem(
                "qk_rope_head_dim", size, "rotary positions turn pairs of dimensions", (size - 1, size + 1)
            )


@config
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward block; no token is dropped."""

    n_experts: int = 8
    top_k: int = 2
    """Experts of each token."""
    ffn_size: int | None = None
    """Width inside one expert; null: as the model's `ffn_size`."""
    n_shared_experts: int = 0
    """Experts that every token passes, as one block of so many times the width (DeepSeekMoE, arXiv 2401.06066)."""
    routing: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts: softmax over all, or each one's sigmoid (DeepSeek-V3, arXiv 2412.19437)."""
    normalize_top_k: bool = True
    """Divide the scores of a token's experts by their sum."""
    routed_scale: float = 1.0
    """Factor on what the routed experts add."""
    n_groups: int = 1
    """Groups of neighbouring experts (experts of one node); must divide n_experts."""
    top_groups: int = 1
    """Groups that a token may use: those with the largest sum of their two best scores (DeepSeek-V3)."""
    aux_loss: float = 0.0
    """Factor on the balance loss of each sequence (DeepSeek-V3, section 2.1.2), added to the gradient of each of its
    tokens; 0: none. `train/loss` does not hold it."""
    bias_rate: float | None = None
    """After each step the bias by which experts are chosen moves by this towards an equal load (arXiv 2408.15664);
    0: there is a bias, which stays; null: there is none."""
    first_k_dense: int = 0
    """The first layers that keep their feed-forward block."""
    layer_frequency: int = 1
    """After them each layer whose index is a multiple of this has experts."""

    def problems(self) -> Iterator[Problem]:
        broken = [
            *at_least(self, 1, "n_experts", "top_k", "ffn_size", "n_groups", "top_groups", "layer_frequency"),
            *at_least(self, 0, "n_shared_experts", "routed_scale", "aux_loss", "bias_rate", "first_k_dense"),
        ]
        yield from broken
        if broken:
            return
        if self.n_experts % self.n_groups:
            rule = f"must divide n_experts ({self.n_experts})"
            yield Problem("n_groups", self.n_groups, rule, nearest_divisors(self.n_experts, self.n_groups))
            return
        if self.top_groups > self.n_groups:
            yield Problem(
                "top_groups", self.top_groups, f"must not exceed n_groups ({self.n_groups})", (self.n_groups,)
            )
            return
        size = self.n_experts // self.n_groups
        if self.n_groups > 1 and size < 2:
            rule = f"a group needs two experts at least, but n_experts is {self.n_experts}"
            yield Problem("n_groups", self.n_groups, rule, (self.n_experts // 2,))
        if self.top_k > self.top_groups * size:
            rule = f"must not exceed the experts that a token may use ({self.top_groups * size})"
            yield Problem("top_k", self.top_k, rule, (self.top_groups * size,))


@config
class MoEBackendConfig:
    """How the products of experts are computed; the result is the same up to rounding."""

    backend: Literal["auto", "loop", "grouped_mm", "triton", "megablocks"] = "auto"
    """auto: the fastest at hand; loop: one expert after the other, the definition; grouped_mm: torch's own; triton: our
    kernel, on a GPU; megablocks: the package of that name, in bf16 on a GPU."""


@config
class DecoderConfig:
    """A decoder-only Transformer (pre-norm). Sizes are counts, not bytes."""

    n_layers: int = 4
    hidden_size: int = 256
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); null: as many as query heads."""
    head_dim: int | None = None
    """Size of a head; null: hidden_size / n_heads."""
    ffn_size: int = 1024
    """Width inside the feed-forward block."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's size."""
    max_seq_len: int = 2048
    """Tokens: the longest sequence; with learned positions also their number."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """relu2 is the square of ReLU (Primer, arXiv 2109.08668)."""
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    sliding_window: int | None = None
    """Sliding window: a token sees itself and the `sliding_window - 1` tokens before it; null: all."""
    attention_bias: bool = False
    """Bias in the query, key and value projections."""
    output_bias: bool = False
    """Bias in the attention's output projection."""
    mlp_bias: bool = False
    mla: MLAConfig | None = None
    """Latent attention in place of heads with keys of their own; null: not."""
    experts: ExpertsConfig | None = None
    """Experts in place of the feed-forward blocks; null: none."""
    tie_embeddings: bool = True
    """The output head is the embedding."""
    logit_softcap: float | None = None
    """c: logits become c·tanh(logits / c) (Gemma 2, arXiv 2408.00118); null: off."""
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
    def qk_head_dim(self) -> int:
        """Of queries and keys."""
        if self.mla is not None:
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.hidden_size // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rope_size(self) -> int:
        """The part of a head that is turned."""
        return self.qk_head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def v_head_dim(self) -> int:
        return self.qk_head_dim if self.mla is None else self.mla.v_head_dim

    @property
    def expert_ffn_size(self) -> int:
        """Width inside one expert."""
        return (
            self.ffn_size if self.experts is None or self.experts.ffn_size is None else self.experts.ffn_size
        )

    def has_experts(self, layer: int) -> bool:
        """Tell whether layer `layer` has a mixture of experts instead of a feed-forward block."""
        moe = self.experts
        return moe is not None and layer >= moe.first_k_dense and layer % moe.layer_frequency == 0

    def problems(self) -> Iterator[Problem]:
        sizes = ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim", "ffn_size", "vocab_size")
        broken = [
            *at_least(self, 1, *sizes, "max_seq_len", "sliding_window"),
            *at_least(self, 0, "init_std", "norm_eps"),
        ]
        yield from broken
        if broken:
            return
        yield from self._head_problems() if self.mla is None else self._latent_problems()
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            yield Problem("logit_softcap", self.logit_softcap, "must be positive, or null for none")
        if self.experts is not None:
            for option, value in (("activation", "swiglu"), ("mlp_bias", False)):
                if getattr(self, option) != value:
                    rule = "experts are gated (swiglu) and have no biases"
                    yield Problem(option, getattr(self, option), rule, (value,))

    def _head_problems(self) -> Iterator[Problem]:
        if self.head_dim is None and self.hidden_size % self.n_heads:
            legal = nearest_divisors(self.hidden_size, self.n_heads)
            rule = f"must divide hidden_size ({self.hidden_size}) when head_dim is not set"
            yield Problem("n_heads", self.n_heads, rule, legal)
        elif self.positions == "rope" and self.qk_head_dim % 2:
            rule = "rotary positions turn pairs of dimensions, so the head size must be even"
            yield Problem("head_dim", self.qk_head_dim, rule, (self.qk_head_dim - 1, self.qk_head_dim + 1))
        if self.n_heads % self.kv_heads:
            legal = nearest_divisors(self.n_heads, self.kv_heads)
            rule = f"must divide n_heads ({self.n_heads}): each key head serves an equal group of query heads"
            yield Problem("n_kv_heads", self.kv_heads, rule, legal)
        if self.rope_scaling is not None and self.rope_scaling.mscale is not None:
            yield Problem("rope_scaling.mscale", self.rope_scaling.mscale, "is for latent attention", (None,))

    def _latent_problems(self) -> Iterator[Problem]:
        fixed = {
            "n_kv_heads": None,
            "head_dim": None,
            "qk_norm": False,
            "attention_bias": False,
            "output_bias": False,
        }
        for option, value in (fixed | {"positions": "rope"}).items():
            if getattr(self, option) != value:
                yield Problem(option, getattr(self, option), "is not an option of latent attention", (value,))
