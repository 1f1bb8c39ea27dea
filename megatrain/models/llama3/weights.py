"""Llama's names at Hugging Face, which Qwen3 shares but for the norms of queries and keys."""

from typing import Any

from megatrain.models.llama3.config import Llama3Config
from megatrain.models.spec import Rule, WeightMap, require
from megatrain.nn.config import DecoderConfig, RopeScaling

NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wk.weight": "self_attn.k_proj.weight",
    "attn.wv.weight": "self_attn.v_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
LLAMA_LIKE: dict[str, object] = {
    "norm": "rms",
    "activation": "swiglu",
    "positions": "rope",
    "window": None,
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "logit_softcap": None,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
}


def llama_like_map(cfg: DecoderConfig, names: dict[str, str]) -> WeightMap:
    """The map of a model laid out as Llama, with `names` inside each layer (ours -> theirs)."""
    rules = [
        Rule("model.embed_tokens.weight", ("embed.weight",)),
        Rule("model.norm.weight", ("norm.weight",)),
    ]
    for layer in range(cfg.n_layers):
        rules += [
            Rule(f"model.layers.{layer}.{theirs}", (f"layers.{layer}.{ours}",))
            for ours, theirs in names.items()
        ]
    if not cfg.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("head.weight",)))
    return WeightMap(tuple(rules))


def llama_like_config(cfg: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Arguments of the transformers config of a model laid out as Llama."""
    return {
        "model_type": model_type,
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.hidden_size,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.ffn_size,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": rope_parameters(cfg.rope_theta, cfg.rope_scaling),
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """transformers' description of rotary positions."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    common = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "linear":
        return common
    common["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        return common | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    yarn = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.attention_factor is not None:
        yarn["attention_factor"] = scaling.attention_factor
    return common | yarn


def weight_map(cfg: Llama3Config) -> WeightMap:
    """Names of `LlamaForCausalLM`'s parameters."""
    require(cfg, "Llama", qk_norm=False, **LLAMA_LIKE)
    return llama_like_map(cfg, NAMES)


def hf_config(cfg: Llama3Config) -> dict[str, Any]:
    """Arguments of transformers' `LlamaConfig`."""
    return llama_like_config(cfg, "llama")
