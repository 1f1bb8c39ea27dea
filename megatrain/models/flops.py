"""How many parameters a model has and how many FLOPs a token costs, in closed form.

A product of (m, k) and (k, n) counts 2·m·k·n; norms, activations, softmax and the embedding lookup count nothing
(they are not matrix products). The backward pass costs twice the forward pass. Two conventions for attention are in
use and both are given: *full* counts every query against every key (PaLM, arXiv 2204.02311, appendix B), *causal*
only the pairs that a causal or windowed mask leaves.
"""

from megatrain.nn.config import DecoderConfig


def _matrix_parameters(cfg: DecoderConfig) -> int:
    """Weights of one layer that take part in matrix products."""
    q_size, kv_size = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    attention = cfg.hidden_size * (2 * q_size + 2 * kv_size)
    matrices = 3 if cfg.activation == "swiglu" else 2
    return attention + matrices * cfg.hidden_size * cfg.ffn_size


def _vector_parameters(cfg: DecoderConfig) -> int:
    """Norms and biases of one layer."""
    q_size, kv_size = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    norms = 2 * _norm_parameters(cfg) + (2 * cfg.head_size if cfg.qk_norm else 0)
    attention = (q_size + 2 * kv_size) * cfg.attention_bias + cfg.hidden_size * cfg.output_bias
    inner = 2 if cfg.activation == "swiglu" else 1
    return norms + attention + (inner * cfg.ffn_size + cfg.hidden_size) * cfg.mlp_bias


def _norm_parameters(cfg: DecoderConfig) -> int:
    return cfg.hidden_size * (2 if cfg.norm == "layer" else 1)


def n_embedding_parameters(cfg: DecoderConfig) -> int:
    """Token and position embeddings; an untied head is not one of them."""
    positions = cfg.max_seq_len if cfg.positions == "learned" else 0
    return (cfg.vocab_size + positions) * cfg.hidden_size


def n_params(cfg: DecoderConfig) -> int:
    """All parameters; a tied head is counted once."""
    head = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.hidden_size
    layers = cfg.n_layers * (_matrix_parameters(cfg) + _vector_parameters(cfg))
    return n_embedding_parameters(cfg) + layers + _norm_parameters(cfg) + head


def attention_pairs(seq_len: int, *, causal: bool, window: int | None) -> int:
    """Query-key pairs of one sequence."""
    if not causal:
        return seq_len * seq_len
    width = seq_len if window is None else min(window, seq_len)
    return width * (width + 1) // 2 + (seq_len - width) * width


def flops_per_token(cfg: DecoderConfig, seq_len: int, *, causal: bool) -> float:
    """Forward and backward FLOPs a token of sequences of `seq_len` tokens, recomputation not counted."""
    matrices = cfg.n_layers * _matrix_parameters(cfg) + cfg.vocab_size * cfg.hidden_size
    pairs = attention_pairs(seq_len, causal=causal, window=cfg.window)
    attention = 2 * 2 * cfg.n_layers * cfg.n_heads * cfg.head_size * pairs / seq_len
    return 3 * (2 * matrices + attention)
