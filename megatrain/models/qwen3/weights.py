"""Hugging Face format of Qwen3: Llama's, with norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.models.llama3.weights import (
    LLAMA_LIKE,
    MODULES,
    llama_like_config,
    llama_like_from_hf,
    llama_like_map,
)
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.spec import WeightMap, require_decoder

QWEN3_MODULES = MODULES | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def weight_map(cfg: Qwen3Config) -> WeightMap:
    """Return the names of `Qwen3ForCausalLM`'s parameters."""
    check(cfg)
    return llama_like_map(cfg, QWEN3_MODULES)


def check(cfg: Qwen3Config) -> None:
    """Refuse options that Hugging Face's Qwen3 does not have."""
    options = LLAMA_LIKE | {"sliding_window"}
    require_decoder(cfg, "Qwen3", expresses=options, qk_norm=True, output_bias=cfg.attention_bias)


def hf_config(cfg: Qwen3Config) -> dict[str, Any]:
    """Return config.json of `Qwen3ForCausalLM`."""
    check(cfg)
    windowed = cfg.sliding_window is not None
    own = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": windowed,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": 0 if windowed else cfg.n_layers,  # the window begins at this layer
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * cfg.n_layers,
    }
    return own | llama_like_config(cfg)


def config_from_hf(hf: Mapping[str, Any]) -> Qwen3Config:
    """Return the config of a `Qwen3ForCausalLM`."""
    return load(Qwen3Config, llama_like_from_hf(hf) | {"sliding_window": _window(hf)})


def _window(hf: Mapping[str, Any]) -> int | None:
    """Return the sliding window that all layers share, or None."""
    window: int | None = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    if window is None:
        return None
    layers = hf["num_hidden_layers"]
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise UserError("config.json: layers with and without sliding_window in one model are not supported")
    return window if kinds[0] == "sliding_attention" else None
