"""Every preset, built on the meta device, has the published number of parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.cli.compose import compose
from megatrain.models.flops import n_embedding_parameters, n_params
from megatrain.models.registry import config_from_hf, get_spec

# Parameters in the safetensors files of the model named in the preset's first line; for GPT-2 as transformers
# counts them (the original paper counts 117M, 345M, 762M and 1542M).
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3_671b": 671_026_404_352,  # without layer 61, which predicts further tokens, and the routers' biases
}
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "head_dim": 128,
}
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def llama(*sizes: int, factor: float, tied: bool) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LLAMA | dict(zip(SIZES, sizes, strict=True)) | {"rope_scaling": rope, "tie_word_embeddings": tied}


def qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    return QWEN3 | dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied}


# What shapes the model in the config.json of the repository named in the preset's first line.
CONFIG_JSON = {
    "gpt2_124m": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2_350m": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2_774m": {"model_type": "gpt2", "n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2_1_5b": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "llama3_1b": llama(16, 2048, 32, 8, 8192, factor=32.0, tied=True),
    "llama3_3b": llama(28, 3072, 24, 8, 8192, factor=32.0, tied=True),
    "llama3_8b": llama(32, 4096, 32, 8, 14336, factor=8.0, tied=False),
    "llama3_70b": llama(80, 8192, 64, 8, 28672, factor=8.0, tied=False),
    "llama3_405b": llama(126, 16384, 128, 8, 53248, factor=8.0, tied=False),
    "qwen3_0_6b": qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3_1_7b": qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3_8b": qwen3(36, 4096, 32, 8, 12288, tied=False),
    "qwen3_32b": qwen3(64, 5120, 64, 8, 25600, tied=False),
}
CONFIG_JSON |= {
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "deepseek_v3_671b": {  # without its quantization_config
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}
UNPUBLISHED = {"llama3_debug", "mixtral_debug", "deepseek_v3_debug", "small", "vit", "convnet"}
IMAGES = {"vit", "convnet"}
"""Those whose samples have one length."""
PRESETS = {path.stem for path in (Path(__file__).parents[3] / "conf" / "model").glob("*.yaml")}


def test_every_preset_is_checked() -> None:
    assert PUBLISHED.keys() | UNPUBLISHED == PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_count(name: str) -> None:
    length = [] if name in IMAGES else ["seq_len=128"]
    cfg = compose([f"model={name}", *length]).model
    with torch.device("meta"):
        model = get_spec(cfg.kind).build(cfg)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == n_params(cfg)
    assert counted == PUBLISHED.get(name, counted)
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.endswith("embed.weight"))
    assert embeddings == n_embedding_parameters(cfg)


def test_active_parameters() -> None:
    """Those that one token meets, as the papers round them: 12.9B; and 37B, which leaves out the embedding."""
    mixtral, deepseek = (
        compose([f"model={name}", "seq_len=128"]).model for name in ("mixtral_8x7b", "deepseek_v3_671b")
    )
    assert round(n_params(mixtral, active=True) / 1e9, 1) == 12.9
    assert round((n_params(deepseek, active=True) - n_embedding_parameters(deepseek)) / 1e9) == 37


@pytest.mark.parametrize("name", CONFIG_JSON)
def test_config(name: str) -> None:
    published = CONFIG_JSON[name]
    if published["model_type"] == "gpt2":
        published = published | {"vocab_size": 50257, "n_positions": 1024, "activation_function": "gelu_new"}
    cfg, expected = compose([f"model={name}", "seq_len=128"]).model, config_from_hf(published)
    cfg = replace(cfg, init_std=expected.init_std)  # the recipe's, for a model that is trained from the start
    if (
        cfg.experts is not None and expected.experts is not None
    ):  # how a model is balanced in training is not in it
        cfg = replace(cfg, experts=replace(cfg.experts, aux_loss=0.0, bias_rate=expected.experts.bias_rate))
    if cfg.mla is not None:
        assert cfg == expected
        return
    # One may leave out what the other spells out.
    spelt = replace(cfg, n_kv_heads=cfg.kv_heads, head_dim=cfg.qk_head_dim)
    assert spelt == replace(expected, n_kv_heads=expected.kv_heads, head_dim=expected.qk_head_dim)
