"""Options of the decoder Transformer; a family's config is this class with that family's defaults."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.ranges import MAX_SIZE, Count, NonNegative, Positive, Range, Size
from megatrain.config.schema import Problem, config, nearest_divisors

MOST_LABELS = 62
"""Labels of a document are the bits of one integer, of which the sign and one more are not theirs."""
GATED = ("swiglu", "geglu")
"""Activations with a gate (GLU variants)."""


@config
class RopeScaling:
    """Scaling of rotary frequencies to contexts longer than the pretraining length."""

    kind: Literal["llama3", "yarn", "linear"] = "llama3"
    """Scaling method. llama3: Llama 3.1's; yarn: YaRN (arXiv 2309.00071); linear: position interpolation (arXiv
    2306.15595)."""
    factor: Annotated[float, Range(at_least=1)] = 8.0
    """Ratio of the extended context length to the original one."""
    original_max_seq_len: Size = 8192
    """Context length before scaling, in tokens."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above `original_max_seq_len / low_freq_factor` are divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below `original_max_seq_len / high_freq_factor` are unchanged."""
    beta_fast: Positive = 32.0
    """yarn: dimensions with more rotations than this over the original length are unchanged."""
    beta_slow: Positive = 1.0
    """yarn: frequencies of dimensions with fewer rotations than this are divided by `factor`."""
    attention_factor: Positive | None = None
    """yarn: factor on cos and sin; null: `0.1 ln(factor) + 1` (YaRN, arXiv 2309.00071, section 3.4)."""
    mscale: NonNegative | None = None
    """yarn with MLA: scores are multiplied by `(0.1 mscale ln(factor) + 1)²`, and cos and sin are not scaled
    (DeepSeek-V2's published code); null: `attention_factor` applies."""

    def problems(self) -> Iterator[Problem]:
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                yield Problem(low, getattr(self, low), f"must be below {high} ({getattr(self, high):g})")


@config
class MLAConfig:
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): sizes of its latent vectors and heads."""

    q_lora_rank: Size | None = 1536
    """Size of the normalized latent vector that queries are projected from; null: the hidden state itself."""
    kv_lora_rank: Size = 512
    """Size of the normalized latent vector that keys and values of all heads are projected from."""
    qk_nope_head_dim: Size = 128
    """Dimensions of each query and key head without rotary positions."""
    qk_rope_head_dim: Size = 64
    """Dimensions of each query and key head with rotary positions; those of the key are shared by all heads."""
    v_head_dim: Size = 128
    """Dimensions of each value head."""

    def problems(self) -> Iterator[Problem]:
        size = self.qk_rope_head_dim
        if size % 2:
            yield Problem(
                "qk_rope_head_dim",
                size,
                "must be even: rotary positions rotate pairs of dimensions",
                (size - 1, size + 1),
            )


@config
class ExpertsConfig:
    """Mixture of experts in place of the feed-forward block; no tokens are dropped."""

    n_experts: Size = 8
    """Number of routed experts."""
    top_k: Size = 2
    """Number of routed experts per token."""
    ffn_size: Size | None = None
    """Intermediate size of one expert; null: the model's `ffn_size`."""
    n_shared_experts: Annotated[int, Range(at_least=0, at_most=MAX_SIZE)] = 0
    """Number of shared experts, applied to every token as one block of that many times the intermediate size
    (DeepSeekMoE, arXiv 2401.06066)."""
    routing: Literal["softmax", "sigmoid"] = "softmax"
    """Score function of the router: softmax over all experts, or a sigmoid of each (DeepSeek-V3, arXiv 2412.19437)."""
    normalize_top_k: bool = True
    """Normalize the scores of a token's experts to sum to 1."""
    routed_scale: Positive = 1.0
    """Factor on the output of the routed experts."""
    n_groups: Size = 1
    """Number of groups of adjacent experts (for example those of one node); must divide n_experts."""
    top_groups: Size = 1
    """Number of groups that a token may be routed to: those with the largest sum of their two best scores
    (DeepSeek-V3)."""
    aux_loss: NonNegative = 0.0
    """Coefficient of the sequence-wise load-balancing loss (DeepSeek-V3, section 2.1.2), which enters the gradient but
    not the reported `train/loss`; 0: none."""
    bias_rate: NonNegative | None = None
    """Update per step of the routing bias towards an equal load (arXiv 2408.15664); 0: the bias stays fixed; null:
    no bias."""
    first_k_dense: Count = 0
    """Number of first layers with a dense feed-forward block instead of experts."""
    layer_frequency: Size = 1
    """Of the layers after `first_k_dense`, those whose index is a multiple of this have experts."""

    def problems(self) -> Iterator[Problem]:
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
            rule = f"must leave at least two experts per group, but n_experts is {self.n_experts}"
            yield Problem("n_groups", self.n_groups, rule, (self.n_experts // 2,))
        if self.top_k > self.top_groups * size:
            rule = f"must not exceed the experts in top_groups groups ({self.top_groups * size})"
            yield Problem("top_k", self.top_k, rule, (self.top_groups * size,))


@config
class MoEBackendConfig:
    """Backend of the experts' matrix products; results are the same up to rounding."""

    backend: Literal["auto", "loop", "grouped_mm", "triton", "megablocks"] = "auto"
    """Grouped matrix multiplication. auto: the fastest one available; loop: one expert after the other (reference);
    grouped_mm: PyTorch's; triton: MegaTrain's kernel, on GPUs; megablocks: the MegaBlocks package, in bf16 on GPUs."""


@config
class ClassifierConfig:
    """A head that classifies each document, in place of the one that predicts tokens."""

    labels: tuple[str, ...] | Literal["auto"] = "auto"
    """Names of the classes; auto: those of the training data, in order."""
    multi_label: bool | Literal["auto"] = "auto"
    """Whether a document may have any number of labels, each of them decided by itself, and not one; auto: as in the
    training data."""
    class_weights: tuple[Positive, ...] | Literal["balanced"] | None = None
    """Factor on the loss of each class's documents (of its positive ones, with multi_label), in the order of `labels`.
    balanced: inverse to the classes' frequencies in the training data, as in scikit-learn; null: none."""

    @property
    def n_classes(self) -> int:
        """Number of classes; at least 2 while they are not known."""
        return 2 if self.labels == "auto" else len(self.labels)

    def problems(self) -> Iterator[Problem]:
        if self.labels == "auto":
            return
        if len(self.labels) < (1 if self.multi_label else 2) or len(set(self.labels)) < len(self.labels):
            yield Problem("labels", self.labels, "must name at least two classes, each once")
        elif self.multi_label and len(self.labels) > MOST_LABELS:
            yield Problem("labels", self.labels, f"must be at most {MOST_LABELS} with multi_label")
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(self.labels):
            rule = f"must have a number for each of the {len(self.labels)} labels"
            yield Problem("class_weights", self.class_weights, rule)


@config
class DecoderConfig:
    """A decoder-only Transformer (pre-norm). Sizes are numbers of elements."""

    n_layers: Annotated[int, Range(at_least=1, at_most=10_000)] = 4
    """Number of Transformer blocks."""
    hidden_size: Size = 256
    """Size of the residual stream."""
    n_heads: Size = 4
    """Number of query heads."""
    n_kv_heads: Size | None = None
    """Number of key and value heads (grouped-query attention); null: n_heads."""
    head_dim: Size | None = None
    """Dimensions of a head; null: hidden_size / n_heads."""
    ffn_size: Size = 1024
    """Intermediate size of the feed-forward block."""
    vocab_size: Size = 4096
    """Number of embedding rows; at least the tokenizer's vocabulary size."""
    max_seq_len: Size = 2048
    """Maximum sequence length in tokens; with learned positions also their number."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalization: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450)."""
    norm_eps: Positive = 1e-5
    """Epsilon added to the variance in norms."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """Activation of the feed-forward block; relu2 is the square of ReLU (Primer, arXiv 2109.08668)."""
    positions: Literal["rope", "learned"] = "rope"
    """Positional encoding: rotary (RoPE, arXiv 2104.09864) or a learned embedding."""
    rope_theta: Annotated[float, Range(above=1)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies to longer contexts; null: none."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head."""
    sliding_window: Size | None = None
    """Sliding window in tokens: a token attends to itself and the `sliding_window - 1` tokens before it; null: full
    attention."""
    full_attention_every: Annotated[int, Range(at_least=2, at_most=MAX_SIZE)] | None = None
    """Every n-th layer has full attention, the others a sliding window (2 in Gemma 2, arXiv 2408.00118; 6 in Gemma 3);
    null: all layers have the window."""
    attention_bias: bool = False
    """Add a bias to the query, key and value projections."""
    output_bias: bool = False
    """Add a bias to the output projection of attention."""
    mlp_bias: bool = False
    """Add a bias to the projections of the feed-forward block."""
    mla: MLAConfig | None = None
    """Multi-head latent attention (MLA); null: standard attention."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the feed-forward blocks; null: none."""
    tie_embeddings: bool = True
    """Share the weight of the token embedding and the output head."""
    classifier: ClassifierConfig | None = None
    """Head that classifies documents, in place of the one that predicts tokens; null: a language model."""
    logit_softcap: Positive | None = None
    """Cap c of the logits, which become c·tanh(logits / c) (Gemma 2, arXiv 2408.00118); null: no cap."""
    init_std: Positive = 0.02
    """Standard deviation of the initial matrices and embeddings."""
    init_scaling: Literal["none", "depth"] = "depth"
    """Initial standard deviation of the output projections of attention and feed-forward blocks. none: `init_std`;
    depth: `init_std / sqrt(2 n_layers)` (GPT-2)."""
    residual_scale: Positive = 1.0
    """Factor on the update that each block adds to the residual stream."""
    embedding_scale: Positive = 1.0
    """Factor on the output of the token embedding (Gemma uses sqrt(hidden_size))."""

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of a query and key head."""
        if self.mla is not None:
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.hidden_size // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rope_size(self) -> int:
        """Dimensions of a query and key head with rotary positions."""
        return self.qk_head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def v_head_dim(self) -> int:
        return self.qk_head_dim if self.mla is None else self.mla.v_head_dim

    @property
    def expert_ffn_size(self) -> int:
        """Intermediate size of one expert."""
        return (
            self.ffn_size if self.experts is None or self.experts.ffn_size is None else self.experts.ffn_size
        )

    @property
    def is_causal(self) -> bool:
        """Whether a position attends to earlier ones alone."""
        return True

    def positions_of(self, seq_len: int) -> int:
        """Return the number of positions that the blocks see of a sample of `seq_len` tokens."""
        return seq_len

    def window(self, layer: int) -> int | None:
        """Return the sliding window of layer `layer` in tokens; None for full attention."""
        every = self.full_attention_every
        return self.sliding_window if every is None or (layer + 1) % every else None

    def has_experts(self, layer: int) -> bool:
        """Tell whether layer `layer` has a mixture of experts instead of a feed-forward block."""
        moe = self.experts
        return moe is not None and layer >= moe.first_k_dense and layer % moe.layer_frequency == 0

    def problems(self) -> Iterator[Problem]:
        if self.full_attention_every is not None and self.sliding_window is None:
            rule = "has no effect without sliding_window: all layers have full attention"
            yield Problem("full_attention_every", self.full_attention_every, rule, (None,))
        if self.classifier is not None and self.logit_softcap is not None:
            rule = "has no effect on a classifier's logits"
            yield Problem("logit_softcap", self.logit_softcap, rule, (None,))
        yield from self._head_problems() if self.mla is None else self._latent_problems()
        if self.experts is not None:
            for option, value in (("activation", "swiglu"), ("mlp_bias", False)):
                if getattr(self, option) != value:
                    rule = "is not supported with experts, which use swiglu and no biases"
                    yield Problem(option, getattr(self, option), rule, (value,))

    def _head_problems(self) -> Iterator[Problem]:
        if self.head_dim is None and self.hidden_size % self.n_heads:
            legal = nearest_divisors(self.hidden_size, self.n_heads)
            rule = f"must divide hidden_size ({self.hidden_size}) when head_dim is not set"
            yield Problem("n_heads", self.n_heads, rule, legal)
        elif self.positions == "rope" and self.qk_head_dim % 2:
            rule = "must be even: rotary positions rotate pairs of dimensions"
            yield Problem("head_dim", self.qk_head_dim, rule, (self.qk_head_dim - 1, self.qk_head_dim + 1))
        if self.n_heads % self.kv_heads:
            legal = nearest_divisors(self.n_heads, self.kv_heads)
            rule = f"must divide n_heads ({self.n_heads}): key heads serve equal groups of query heads"
            yield Problem("n_kv_heads", self.kv_heads, rule, legal)
        if self.rope_scaling is not None and self.rope_scaling.mscale is not None:
            yield Problem(
                "rope_scaling.mscale",
                self.rope_scaling.mscale,
                "is an option of latent attention (model.mla) only",
                (None,),
            )

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
                yield Problem(
                    option,
                    getattr(self, option),
                    "is not an option of latent attention (model.mla)",
                    (value,),
                )
