"""How many parameters a model has and how many FLOPs a token costs, in closed form.

A product of (m, k) and (k, n) counts 2·m·k·n; norms, activations, softmax and the embedding lookup count nothing
(they are not matrix products). The backward pass costs twice the forward pass. Two conventions for attention are in
use and both are given: *full* counts every query against every key (PaLM, arXiv 2204.02311, appendix B), *causal*
only the pairs that a causal or windowed mask leaves.
"""

from megatrain.nn.config import GATED, DecoderConfig


def _attention_parameters(cfg: DecoderConfig) -> int:
    """Weights of one layer's attention that take part in matrix products."""
    mla = cfg.mla
    if mla is not None:
        q_size, o_size = cfg.n_heads * cfg.qk_head_dim, cfg.n_heads * mla.v_head_dim
        queries = cfg.hidden_size * q_size
        if mla.q_lora_rank is not None:
            queries = mla.q_lora_rank * (cfg.hidden_size + q_size)
        keys_values = cfg.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
        down = cfg.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        return queries + keys_values + down + o_size * cfg.hidden_size
    q_size, kv_size = cfg.n_heads * cfg.qk_head_dim, cfg.kv_heads * cfg.qk_head_dim
    return cfg.hidden_size * (2 * q_size + 2 * kv_size)


def _feed_forward_parameters(cfg: DecoderConfig, layer: int, *, active: bool) -> int:
    """The same of layer number `layer`'s feed-forward block; `active`: only those that one token meets."""
    matrices = 3 if cfg.activation in GATED else 2
    if cfg.experts is None or not cfg.has_experts(layer):
        return matrices * cfg.hidden_size * cfg.ffn_size
    experts = (cfg.experts.top_k if active else cfg.experts.n_experts) + cfg.experts.n_shared_experts
    router = cfg.experts.n_experts * cfg.hidden_size
    return matrices * cfg.hidden_size * cfg.expert_ffn_size * experts + router


def _matrix_parameters(cfg: DecoderConfig, *, active: bool) -> int:
    """Weights of all layers that take part in matrix products."""
    blocks = sum(_feed_forward_parameters(cfg, layer, active=active) for layer in range(cfg.n_layers))
    return cfg.n_layers * _attention_parameters(cfg) + blocks


def _vector_parameters(cfg: DecoderConfig) -> int:
    """Norms and biases of one layer."""
    q_size, kv_size = cfg.n_heads * cfg.qk_head_dim, cfg.kv_heads * cfg.qk_head_dim
    norms = 2 * _norm_parameters(cfg) + (2 * cfg.qk_head_dim if cfg.qk_norm else 0)
    attention = (q_size + 2 * kv_size) * cfg.attention_bias + cfg.hidden_size * cfg.output_bias
    if cfg.mla is not None:
        attention = (cfg.mla.q_lora_rank or 0) + cfg.mla.kv_lora_rank  # norms
    inner = 2 if cfg.activation in GATED else 1
    return norms + attention + (inner * cfg.ffn_size + cfg.hidden_size) * cfg.mlp_bias


def _norm_parameters(cfg: DecoderConfig) -> int:
    return cfg.hidden_size * (2 if cfg.norm == "layer" else 1)


def n_embedding_parameters(cfg: DecoderConfig) -> int:
    """Token and position embeddings; an untied head is not one of them."""
    positions = cfg.max_seq_len if cfg.positions == "learned" else 0
    return (cfg.vocab_size + positions) * cfg.hidden_size


def n_params(cfg: DecoderConfig, *, active: bool = False) -> int:
    """All parameters; a tied head is counted once. `active`: without the experts that one token does not meet."""
    head = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.hidden_size
    layers = _matrix_parameters(cfg, active=active) + cfg.n_layers * _vector_parameters(cfg)
    return n_embedding_parameters(cfg) + layers + _norm_parameters(cfg) + head


def attention_pairs(seq_len: int, *, causal: bool, window: int | None) -> int:
    """Query-key pairs of one sequence."""
    if not causal:
        return seq_len * seq_len
    width = seq_len if window is None else min(window, seq_len)
    return width * (width + 1) // 2 + (seq_len - width) * width


def flops_per_token(cfg: DecoderConfig, seq_len: int, *, causal: bool) -> float:
    """Forward and backward FLOPs a token of sequences of `seq_len` tokens, recomputation not counted.

    Of experts only those that a token meets count.
    """
    matrices = _matrix_parameters(cfg, active=True) + cfg.vocab_size * cfg.hidden_size
    pairs = attention_pairs(seq_len, causal=causal, window=cfg.sliding_window)
    attention = 2 * cfg.n_layers * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) * pairs / seq_len
    return 3 * (2 * matrices + attention)
