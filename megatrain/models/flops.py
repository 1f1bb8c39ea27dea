"""Number of parameters of a model and FLOPs per token, in closed form.

A product of (m, k) and (k, n) counts 2·m·k·n; norms, activations, softmax and the embedding lookup count nothing
(they are not matrix products). The backward pass costs twice the forward pass. Two conventions for attention are in
use and both are given: *full* counts every query against every key (PaLM, arXiv 2204.02311, appendix B), *causal*
only the pairs that a causal or windowed mask leaves.
"""

import math
from collections import Counter

from megatrain.nn.config import DecoderConfig
from megatrain.nn.contract import Role
from megatrain.nn.image_config import ConvolutionConfig
from megatrain.nn.plan import decoder_plan
from megatrain_kernels.flash_attention.reference import Rule


def n_embedding_parameters(cfg: DecoderConfig) -> int:
    """Count the token and position embeddings; an untied head is not one of them."""
    return sum(math.prod(w.shape) for w in decoder_plan(cfg).ends.values() if w.role & Role.EMBEDDING)


def n_params(cfg: DecoderConfig, *, active: bool = False) -> int:
    """Count all parameters, a tied head once; `active` excludes experts that a token is not routed to."""
    return decoder_plan(cfg).n_params(active=active)


def attention_pairs(seq_len: int, *, causal: bool, window: int | None) -> int:
    """Count the query-key pairs of one sequence that the mask allows."""
    rule = Rule(causal=causal, scale=1.0, window=window if causal else None, softcap=None, q_offset=0)
    return rule.pairs(seq_len, seq_len)


def flops_per_token(cfg: DecoderConfig, seq_len: int, *, causal: bool, frozen: bool = False) -> float:
    """Return the FLOPs of forward and backward for one token of a sequence of `seq_len` tokens.

    Recomputation does not count, nor do adapters; of the experts, only those that a token is routed to count.

    Args:
        frozen: the weights are not trained, so that a product's backward pass has one product in place of two.
    """
    plan, seq_len, tokens = decoder_plan(cfg), cfg.positions_of(seq_len), seq_len
    matrices = plan.head_products + sum(plan.block_products(layer) for layer in range(cfg.n_layers))
    pairs = sum(
        attention_pairs(seq_len, causal=causal and cfg.is_causal, window=window) * layers
        for window, layers in Counter(map(cfg.window, range(cfg.n_layers))).items()
    )
    per_pair = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    attention = 0.0 if isinstance(cfg, ConvolutionConfig) else 2 * per_pair * pairs / seq_len
    return ((2 if frozen else 3) * 2 * matrices + 3 * attention) * seq_len / tokens
