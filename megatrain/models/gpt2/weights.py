"""Hugging Face format of GPT-2: fused query-key-value projection, weights stored as (in, out)."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.load import load
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.spec import Rule, WeightMap, require_decoder, require_hf, value_of

MODULES = {
    "ln_1": ("attn_norm",),
    "attn.c_attn": ("attn.wq", "attn.wk", "attn.wv"),
    "attn.c_proj": ("attn.wo",),
    "ln_2": ("mlp_norm",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


def weight_map(cfg: GPT2Config) -> WeightMap:
    """Return the names of `GPT2LMHeadModel`'s parameters."""
    check(cfg)
    rules = [
        Rule("transformer.wte.weight", ("embed.weight",)),
        Rule("transformer.wpe.weight", ("pos_embed.weight",)),
    ]
    for layer in range(cfg.n_layers):
        for theirs, ours in MODULES.items():
            for part in ("weight", "bias"):
                rules.append(
                    Rule(
                        f"transformer.h.{layer}.{theirs}.{part}",
                        tuple(f"layers.{layer}.{name}.{part}" for name in ours),
                        transpose=part == "weight" and theirs.split(".")[-1].startswith("c_"),
                    )
                )
    rules += [Rule(f"transformer.ln_f.{part}", (f"norm.{part}",)) for part in ("weight", "bias")]
    if not cfg.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("head.weight",)))
    return WeightMap(
        tuple(rules),
        prefix="transformer.",
        repeats={"lm_head.weight": "transformer.wte.weight"} if cfg.tie_embeddings else {},
        constants=r"transformer\.h\.\d+\.attn\.(masked_)?bias",  # the causal mask
    )


def check(cfg: GPT2Config) -> None:
    """Refuse options that Hugging Face's GPT-2 does not have."""
    require_decoder(
        cfg,
        "GPT-2",
        expresses={"tie_embeddings", "rope_theta", "rope_scaling", "n_kv_heads", "head_dim"},
        norm="layer",
        activation=cfg.activation if cfg.activation in ACTIVATIONS else "gelu_tanh",
        positions="learned",
        kv_heads=cfg.n_heads,
        qk_head_dim=cfg.hidden_size // cfg.n_heads,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def hf_config(cfg: GPT2Config) -> dict[str, Any]:
    """Return config.json of `GPT2LMHeadModel`."""
    check(cfg)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": cfg.n_layers,
        "n_embd": cfg.hidden_size,
        "n_head": cfg.n_heads,
        "n_inner": cfg.ffn_size,
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_seq_len,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": ACTIVATIONS[cfg.activation],
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from_hf(hf: Mapping[str, Any]) -> GPT2Config:
    """Return the config of a `GPT2LMHeadModel`. Dropout, which affects training only, is ignored."""
    require_hf(
        hf,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        quantization_config=None,
    )
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    activation = hf.get("activation_function", "gelu_new")
    require_hf(hf, activation_function=activation if activation in ours else "gelu_new")
    data = {
        "n_layers": value_of(hf, "n_layer"),
        "hidden_size": value_of(hf, "n_embd"),
        "n_heads": value_of(hf, "n_head"),
        "ffn_size": hf.get("n_inner") or 4 * value_of(hf, "n_embd"),
        "vocab_size": value_of(hf, "vocab_size"),
        "max_seq_len": value_of(hf, "n_positions"),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": ours[activation],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "init_std": hf.get("initializer_range", 0.02),
    }
    return load(GPT2Config, data)
