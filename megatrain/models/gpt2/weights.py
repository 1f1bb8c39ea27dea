"""GPT-2's names at Hugging Face: fused query-key-value, weights kept as (in, out)."""

from typing import Any

from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.spec import Rule, WeightMap, require

PAIRS = {
    "ln_1": ("attn_norm",),
    "attn.c_attn": ("attn.wq", "attn.wk", "attn.wv"),
    "attn.c_proj": ("attn.wo",),
    "ln_2": ("mlp_norm",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}


def weight_map(cfg: GPT2Config) -> WeightMap:
    """Names of `GPT2LMHeadModel`'s parameters."""
    require(
        cfg,
        "GPT-2",
        norm="layer",
        activation="gelu_tanh",
        positions="learned",
        kv_heads=cfg.n_heads,
        head_size=cfg.hidden_size // cfg.n_heads,
        qk_norm=False,
        window=None,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        logit_softcap=None,
        residual_scale=1.0,
        embedding_scale=1.0,
    )
    rules = [
        Rule("transformer.wte.weight", ("embed.weight",)),
        Rule("transformer.wpe.weight", ("pos_embed.weight",)),
    ]
    for layer in range(cfg.n_layers):
        for theirs, ours in PAIRS.items():
            for part in ("weight", "bias"):
                rules.append(
                    Rule(
                        f"transformer.h.{layer}.{theirs}.{part}",
                        tuple(f"layers.{layer}.{name}.{part}" for name in ours),
                        transpose=part == "weight" and theirs.split(".")[-1].startswith("c_"),
                    )
                )
    rules += [Rule(f"transformer.ln_f.{part}", (f"norm.{part}",)) for part in ("weight", "bias")]
    return WeightMap(tuple(rules))


def hf_config(cfg: GPT2Config) -> dict[str, Any]:
    """Arguments of transformers' `GPT2Config`."""
    return {
        "model_type": "gpt2",
        "n_layer": cfg.n_layers,
        "n_embd": cfg.hidden_size,
        "n_head": cfg.n_heads,
        "n_inner": cfg.ffn_size,
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.max_seq_len,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": "gelu_new",
        "bos_token_id": cfg.vocab_size - 1,
        "eos_token_id": cfg.vocab_size - 1,
    }
