"""Hugging Face format of Mixtral: Llama's, with a separate matrix per expert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatrain.config.load import load
from megatrain.models.llama3.weights import (
    LLAMA_LIKE,
    MODULES,
    llama_like_config,
    llama_like_from_hf,
    llama_like_map,
)
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.models.spec import (
    Stack,
    WeightMap,
    require,
    require_decoder,
    require_hf,
    require_part,
    value_of,
)
from megatrain.nn.config import DecoderConfig, ExpertsConfig

MIXTRAL_MODULES = {ours: theirs for ours, theirs in MODULES.items() if not ours.startswith("mlp.")} | {
    "moe.router": "block_sparse_moe.gate"
}
EXPERTS = {
    "gate": "block_sparse_moe.experts.{}.w1",
    "up": "block_sparse_moe.experts.{}.w3",
    "down": "block_sparse_moe.experts.{}.w2",
}
"""Matrices of one expert: MegaTrain's name -> Hugging Face's with the expert's index."""


def weight_map(cfg: MixtralConfig) -> WeightMap:
    """Return the names of the tensors of `MixtralForCausalLM`'s files."""
    check(cfg)
    return replace(llama_like_map(cfg, MIXTRAL_MODULES), stacks=expert_stacks(cfg, EXPERTS))


def expert_stacks(cfg: DecoderConfig, names: Mapping[str, str]) -> tuple[Stack, ...]:
    """Return the stacked matrices of all layers' experts; `names` has the form of `EXPERTS`."""
    assert cfg.experts is not None
    return tuple(
        Stack(
            tuple(f"model.layers.{layer}.{theirs.format(i)}.weight" for i in range(cfg.experts.n_experts)),
            f"layers.{layer}.moe.experts.{ours}",
        )
        for layer in range(cfg.n_layers)
        if cfg.has_experts(layer)
        for ours, theirs in names.items()
    )


def check(cfg: MixtralConfig) -> None:
    """Refuse options that Hugging Face's Mixtral does not have."""
    options = LLAMA_LIKE - {"attention_bias"} | {"sliding_window", "experts"}
    require_decoder(cfg, "Mixtral", expresses=options)
    common = ExpertsConfig()
    fixed = ("routing", "normalize_top_k", "n_shared_experts", "routed_scale", "n_groups", "bias_rate")
    wanted = {key: getattr(common, key) for key in (*fixed, "first_k_dense", "layer_frequency")}
    require(require_part(cfg, "Mixtral", "experts"), "Mixtral", prefix="model.experts.", **wanted)


def hf_config(cfg: MixtralConfig) -> dict[str, Any]:
    """Return config.json of `MixtralForCausalLM`."""
    check(cfg)
    assert cfg.experts is not None
    own = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": cfg.expert_ffn_size,
        "num_local_experts": cfg.experts.n_experts,
        "num_experts_per_tok": cfg.experts.top_k,
        "sliding_window": cfg.sliding_window,
    }
    return llama_like_config(cfg) | own


def config_from_hf(hf: Mapping[str, Any]) -> MixtralConfig:
    """Return the config of a `MixtralForCausalLM`."""
    require_hf(hf, router_jitter_noise=0.0)
    moe = {"n_experts": value_of(hf, "num_local_experts"), "top_k": value_of(hf, "num_experts_per_tok")}
    return load(
        MixtralConfig, llama_like_from_hf(hf) | {"experts": moe, "sliding_window": hf.get("sliding_window")}
    )
