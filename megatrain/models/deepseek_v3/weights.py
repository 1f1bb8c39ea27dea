"""Hugging Face format of DeepSeek-V3, where the two dimensions of a rotary pair are adjacent."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.llama3.weights import MODULES, llama_like_config, llama_like_from_hf, llama_like_map
from megatrain.models.mixtral.weights import LLAMA_LIKE, expert_stacks
from megatrain.models.spec import (
    Rule,
    WeightMap,
    require,
    require_decoder,
    require_hf,
    require_part,
    value_of,
)

NORMS = {name: MODULES[name] for name in ("attn_norm", "mlp_norm")}
MLP = {name: MODULES[name] for name in ("mlp.gate", "mlp.up", "mlp.down")}
SHARED = {f"moe.shared.{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
MOE = {
    "n_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "ffn_size": "moe_intermediate_size",
    "n_shared_experts": "n_shared_experts",
    "normalize_top_k": "norm_topk_prob",
    "routed_scale": "routed_scaling_factor",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "first_k_dense": "first_k_dense_replace",
}
"""Config fields: MegaTrain's name -> Hugging Face's."""
MIXING = ("mscale", "mscale_all_dim")
"""Keys of rope_scaling: temperatures of cos and sin, and of the attention scores."""


def weight_map(cfg: DeepseekV3Config) -> WeightMap:
    """Return the names of the tensors of `DeepseekV3ForCausalLM`'s files, without multi-token prediction."""
    check(cfg)
    plain = llama_like_map(cfg, NORMS)
    rules = [rule for layer in range(cfg.n_layers) for rule in _layer_rules(cfg, layer)]
    further = rf"model\.layers\.{cfg.n_layers}\..*"
    return replace(
        plain,
        rules=(*plain.rules, *rules),
        stacks=expert_stacks(cfg, EXPERTS),
        constants=f"{plain.constants}|{further}",
    )


def _layer_rules(cfg: DeepseekV3Config, layer: int) -> Iterator[Rule]:
    mla, theirs, ours = cfg.mla, f"model.layers.{layer}.", f"layers.{layer}."
    assert mla is not None
    rotary = mla.qk_rope_head_dim
    heads, key = (cfg.qk_head_dim, rotary), (mla.kv_lora_rank + rotary, rotary)
    attention = theirs + "self_attn."
    if mla.q_lora_rank is None:
        yield Rule(f"{attention}q_proj.weight", (f"{ours}attn.wq.weight",), pairs=heads)
    else:
        yield Rule(f"{attention}q_a_proj.weight", (f"{ours}attn.wq_down.weight",))
        yield Rule(f"{attention}q_a_layernorm.weight", (f"{ours}attn.q_norm.weight",))
        yield Rule(f"{attention}q_b_proj.weight", (f"{ours}attn.wq_up.weight",), pairs=heads)
    joined = (f"{ours}attn.wkv_down.weight", f"{ours}attn.wk_rope.weight")
    yield Rule(f"{attention}kv_a_proj_with_mqa.weight", joined, pairs=key)
    yield Rule(f"{attention}kv_a_layernorm.weight", (f"{ours}attn.kv_norm.weight",))
    yield Rule(f"{attention}kv_b_proj.weight", (f"{ours}attn.wkv_up.weight",))
    yield Rule(f"{attention}o_proj.weight", (f"{ours}attn.wo.weight",))
    experts = cfg.has_experts(layer)
    for mine, other in (SHARED | {"moe.router": "mlp.gate"} if experts else MLP).items():
        yield Rule(f"{theirs}{other}.weight", (f"{ours}{mine}.weight",))
    if experts:
        yield Rule(f"{theirs}mlp.gate.e_score_correction_bias", (f"{ours}moe.expert_bias",))


def check(cfg: DeepseekV3Config) -> None:
    """Refuse options that Hugging Face's DeepSeek-V3 does not have."""
    # Its norms inside attention use this epsilon regardless of config.json.
    require_decoder(cfg, "DeepSeek-V3", expresses=LLAMA_LIKE | {"mla", "experts"}, norm_eps=1e-6)
    require_part(cfg, "DeepSeek-V3", "mla")
    moe = require_part(cfg, "DeepSeek-V3", "experts")
    require(moe, "DeepSeek-V3", prefix="model.experts.", routing="sigmoid", layer_frequency=1)
    if moe.bias_rate is None or not moe.n_shared_experts:
        name, value = ("bias_rate", "null") if moe.bias_rate is None else ("n_shared_experts", 0)
        raise UserError(f"a Hugging Face DeepSeek-V3 model cannot express: model.experts.{name}={value}")


def hf_config(cfg: DeepseekV3Config) -> dict[str, Any]:
    """Return config.json of `DeepseekV3ForCausalLM`."""
    check(cfg)
    common = llama_like_config(cfg)
    del common["head_dim"]
    own: dict[str, Any] = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    own |= {theirs: getattr(cfg.mla, ours) for ours, theirs in LATENT.items()}
    own |= {theirs: getattr(cfg.experts, ours) for ours, theirs in MOE.items()}
    own |= {
        "moe_intermediate_size": cfg.expert_ffn_size,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    own |= {"moe_layer_freq": 1, "num_nextn_predict_layers": 0}
    if cfg.rope_scaling is not None and cfg.rope_scaling.mscale is not None:
        common["rope_scaling"] |= dict.fromkeys(MIXING, cfg.rope_scaling.mscale)
    return common | own


def config_from_hf(hf: Mapping[str, Any]) -> DeepseekV3Config:
    """Return the config of a `DeepseekV3ForCausalLM`."""
    fixed = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    require_hf(hf, attention_bias=False, num_key_value_heads=value_of(hf, "num_attention_heads"), **fixed)
    plain, mscale = _without_mixing(hf)
    data = llama_like_from_hf(plain) | {"n_kv_heads": None, "head_dim": None}
    if data["rope_scaling"] is not None:
        data["rope_scaling"] |= {"mscale": mscale}
    moe = {"routing": "sigmoid", "bias_rate": 0.0} | {
        ours: value_of(hf, theirs) for ours, theirs in MOE.items()
    }
    latent = {ours: value_of(hf, theirs) for ours, theirs in LATENT.items()}
    return load(DeepseekV3Config, data | {"mla": latent, "experts": moe})


def _without_mixing(hf: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return config.json without the temperatures in its description of rotary positions; and their common value.

    Raises:
        UserError: the two differ, so that cos and sin would be scaled as well.
    """
    plain, found = dict(hf), None
    for key in ("rope_parameters", "rope_scaling"):
        if not plain.get(key):
            continue
        mscale, all_dims = (plain[key].get(name) or None for name in MIXING)
        if mscale != all_dims:
            raise UserError(
                f"config.json: {key} with mscale={mscale}, mscale_all_dim={all_dims} is not supported"
            )
        found = found or mscale
        plain[key] = {name: value for name, value in plain[key].items() if name not in MIXING}
    return plain, found
