"""Hugging Face format of Llama, which Qwen3 shares except for the norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.spec import Rule, WeightMap, require_decoder, require_hf, value_of
from megatrain.nn.config import DecoderConfig, RopeScaling

MODULES = {
    "attn_norm": "input_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Modules of each layer: MegaTrain's name -> Hugging Face's."""
LLAMA_LIKE = frozenset(
    {"n_kv_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias", "tie_embeddings"}
)
"""Options other than sizes that config.json can express for Llama-like models."""
SCALING = {
    "factor": "factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
"""Fields of RopeScaling: MegaTrain's name -> Hugging Face's."""
SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}
"""Fields of RopeScaling that each kind uses."""


def weight_map(cfg: Llama3Config) -> WeightMap:
    """Return the names of `LlamaForCausalLM`'s parameters."""
    check(cfg)
    return llama_like_map(cfg, MODULES)


def check(cfg: Llama3Config) -> None:
    """Refuse options that Hugging Face's Llama does not have."""
    require_decoder(cfg, "Llama", expresses=LLAMA_LIKE | {"mlp_bias"}, output_bias=cfg.attention_bias)


def hf_config(cfg: Llama3Config) -> dict[str, Any]:
    """Return config.json of `LlamaForCausalLM`."""
    check(cfg)
    own = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": cfg.mlp_bias}
    return own | llama_like_config(cfg)


def config_from_hf(hf: Mapping[str, Any]) -> Llama3Config:
    """Return the config of a `LlamaForCausalLM`, of any generation of Llama."""
    data = llama_like_from_hf(hf) | {"mlp_bias": hf.get("mlp_bias", False)}
    return load(Llama3Config, data)


def llama_like_map(cfg: DecoderConfig, modules: Mapping[str, str]) -> WeightMap:
    """Return the weight map of a Llama-like model with `modules` in each layer."""
    rules = [
        Rule("model.embed_tokens.weight", ("embed.weight",)),
        Rule("model.norm.weight", ("norm.weight",)),
    ]
    for layer in range(cfg.n_layers):
        for ours, theirs in modules.items():
            biased = cfg.attention_bias if ours.startswith("attn.w") else cfg.mlp_bias and "mlp." in ours
            for part in ("weight", "bias") if biased else ("weight",):
                rules.append(
                    Rule(f"model.layers.{layer}.{theirs}.{part}", (f"layers.{layer}.{ours}.{part}",))
                )
    if not cfg.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("head.weight",)))
    return WeightMap(
        tuple(rules),
        repeats={"lm_head.weight": "model.embed_tokens.weight"} if cfg.tie_embeddings else {},
        constants=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )


def llama_like_config(cfg: DecoderConfig) -> dict[str, Any]:
    """Return the part of config.json that Llama-like models have in common.

    Rotary positions are written as `rope_theta` and `rope_scaling`, which every version of transformers reads.
    """
    return {
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.hidden_size,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.qk_head_dim,
        "intermediate_size": cfg.ffn_size,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling is None else scaling_to_hf(cfg.rope_scaling),
        "attention_bias": cfg.attention_bias,
        "initializer_range": cfg.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llama_like_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a Llama-like model as plain data; the inverse of `llama_like_config`."""
    require_hf(hf, hidden_act="silu", quantization_config=None)
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    if hf.get("rope_parameters") and hf.get("rope_scaling") not in (None, hf["rope_parameters"]):
        raise UserError("config.json: rope_parameters and rope_scaling differ; keep the one that holds")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return {
        "n_layers": value_of(hf, "num_hidden_layers"),
        "hidden_size": value_of(hf, "hidden_size"),
        "n_heads": value_of(hf, "num_attention_heads"),
        "n_kv_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "ffn_size": value_of(hf, "intermediate_size"),
        "vocab_size": value_of(hf, "vocab_size"),
        "max_seq_len": value_of(hf, "max_position_embeddings"),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "rope_scaling": scaling_from_hf(rope, max_seq_len=value_of(hf, "max_position_embeddings")),
        "attention_bias": hf.get("attention_bias", False),
        "output_bias": hf.get("attention_bias", False),
        "init_std": hf.get("initializer_range", 0.02),
    }


def scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """Return transformers' description of a rotary scaling."""
    values = {SCALING[name]: getattr(scaling, name) for name in SCALING_FIELDS[scaling.kind]}
    return {"rope_type": scaling.kind} | {key: value for key, value in values.items() if value is not None}


def scaling_from_hf(rope: Mapping[str, Any], *, max_seq_len: int) -> dict[str, Any] | None:
    """Return plain data of RopeScaling, or None without scaling. Where no original length is given, `max_seq_len` is
    used, as in transformers.

    Raises:
        UserError: a kind or option of rotary scaling that MegaTrain does not support.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return None
    theirs = {SCALING[name]: name for name in SCALING_FIELDS.get(kind, ())}
    neutral = {"rope_type": kind, "type": kind, "partial_rotary_factor": 1.0, "truncate": True}
    unknown = {
        key: value
        for key, value in rope.items()
        if key not in theirs and key != "rope_theta" and neutral.get(key) != value
    }
    if kind not in SCALING_FIELDS or unknown:
        known = ", ".join(SCALING_FIELDS)
        raise UserError(f"config.json: rope_scaling={dict(rope)} is not supported (kinds: {known})")
    found = {theirs[key]: value for key, value in rope.items() if key in theirs}
    return {"kind": kind, "original_max_seq_len": max_seq_len} | found
