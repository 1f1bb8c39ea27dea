"""Qwen3's names at Hugging Face: Llama's, and a norm of queries and keys."""

from typing import Any

from megatrain.models.llama3.weights import LLAMA_LIKE, NAMES, llama_like_config, llama_like_map
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.spec import WeightMap, require

QWEN3_NAMES = NAMES | {
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
}


def weight_map(cfg: Qwen3Config) -> WeightMap:
    """Names of `Qwen3ForCausalLM`'s parameters."""
    require(cfg, "Qwen3", qk_norm=True, **LLAMA_LIKE)
    return llama_like_map(cfg, QWEN3_NAMES)


def hf_config(cfg: Qwen3Config) -> dict[str, Any]:
    """Arguments of transformers' `Qwen3Config`."""
    return llama_like_config(cfg, "qwen3") | {"use_sliding_window": False}
