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

FULL, WINDOWED = "full_attention", "sliding_attention"
"""Values of `layer_types`."""
QWEN3_MODULES = MODULES | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def weight_map(cfg: Qwen3Config) -> WeightMap:
    """Return the names of `Qwen3ForCausalLM`'s parameters."""
    check(cfg)
    return llama_like_map(cfg, QWEN3_MODULES)


def check(cfg: Qwen3Config) -> None:
    """Refuse options that Hugging Face's Qwen3 does not have."""
    options = LLAMA_LIKE | {"sliding_window", "full_attention_every"}
    require_decoder(cfg, "Qwen3", expresses=options, qk_norm=True, output_bias=cfg.attention_bias)


def hf_config(cfg: Qwen3Config) -> dict[str, Any]:
    """Return config.json of `Qwen3ForCausalLM`."""
    check(cfg)
    windowed = cfg.sliding_window is not None
    kinds = [FULL if cfg.window(layer) is None else WINDOWED for layer in range(cfg.n_layers)]
    own = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": windowed,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": 0 if windowed else cfg.n_layers,  # the window begins at this layer
        "layer_types": kinds,
    }
    return own | llama_like_config(cfg)


def config_from_hf(hf: Mapping[str, Any]) -> Qwen3Config:
    """Return the config of a `Qwen3ForCausalLM`."""
    return load(Qwen3Config, llama_like_from_hf(hf) | _windows(hf))


def _windows(hf: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the options of the sliding window and of the layers that have it."""
    window: int | None = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    layers = hf["num_hidden_layers"]
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [WINDOWED if layer >= first else FULL for layer in range(layers)]
    if window is None or WINDOWED not in kinds:
        return {"sliding_window": None}
    every = kinds.index(FULL) + 1 if FULL in kinds else None
    if kinds != [WINDOWED if every is None or (layer + 1) % every else FULL for layer in range(layers)]:
        raise UserError(
            "config.json: layer_types, or max_window_layers: full attention in other layers than every n-th, with a "
            "sliding_window in the rest, is not supported"
        )
    return {"sliding_window": window, "full_attention_every": every}
