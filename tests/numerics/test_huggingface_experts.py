"""Models with experts against transformers', through the files that it writes and reads, in both directions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain.config.errors import UserError
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.models.registry import config_from_hf, get_spec
from megatrain.nn.config import ExpertsConfig, MLAConfig, RopeScaling

TINY: dict[str, Any] = {"hidden_size": 48, "n_heads": 4, "ffn_size": 80, "vocab_size": 67, "max_seq_len": 64}
LATENT = MLAConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14)
MOE = ExpertsConfig(
    n_experts=8,
    top_k=3,
    ffn_size=20,
    n_shared_experts=2,
    routing="sigmoid",
    routed_scale=2.5,
    n_groups=4,
    top_groups=2,
    bias_rate=0.0,
    first_k_dense=1,
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16, mscale=0.7)
DEEPSEEK = DeepseekV3Config(**TINY, n_layers=3, mla=LATENT, experts=MOE)
MODELS: dict[str, MixtralConfig | DeepseekV3Config] = {
    "mixtral": MixtralConfig(
        **TINY, n_layers=2, n_kv_heads=2, head_dim=12, experts=ExpertsConfig(n_experts=5, top_k=2)
    ),
    "mixtral, window, tied": MixtralConfig(
        **TINY,
        n_layers=1,
        n_kv_heads=1,
        head_dim=16,
        sliding_window=9,
        tie_embeddings=True,
        experts=ExpertsConfig(n_experts=3, top_k=1),
    ),
    "deepseek": DEEPSEEK,
    "deepseek, plain queries, own scores": replace(
        DEEPSEEK,
        mla=replace(LATENT, q_lora_rank=None),
        experts=replace(MOE, normalize_top_k=False, n_groups=1, top_groups=1, n_shared_experts=1),
    ),
    "deepseek, yarn": replace(DEEPSEEK, rope_scaling=YARN),
    "deepseek, yarn on cos and sin": replace(DEEPSEEK, rope_scaling=replace(YARN, mscale=None)),
}


def hugging_face(cfg: MixtralConfig | DeepseekV3Config) -> torch.nn.Module:
    """Random weights throughout, also of norms and of the biases by which experts are chosen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**get_spec(cfg.kind).hf_config(cfg)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def ours(cfg: MixtralConfig | DeepseekV3Config, tensors: dict[str, Tensor]) -> torch.nn.Module:
    model = get_spec(cfg.kind).build(cfg)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(get_spec(cfg.kind).weights(cfg).load(tensors, shapes))
    return model


def draw_tokens() -> Tensor:
    return torch.randint(67, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_transformers_saved(name: str, tmp_path: Path) -> None:
    cfg = MODELS[name]
    reference = hugging_face(cfg)
    reference.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert not any("gate_up_proj" in key for key in written)  # the published form: expert by expert
    model = ours(cfg, written)
    with torch.no_grad():
        expected = reference(draw_tokens()).logits
        # Choices between near ties aside, which these weights do not have, only roundings of float32 differ.
        torch.testing.assert_close(model(draw_tokens()), expected, rtol=1e-5, atol=1e-5)
    returned = get_spec(cfg.kind).weights(cfg).export(model.state_dict())
    assert returned.keys() == written.keys()
    for key, value in written.items():
        assert torch.equal(returned[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    cfg = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    model = get_spec(cfg.kind).build(cfg)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    tensors = get_spec(cfg.kind).weights(cfg).export(model.state_dict())
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(get_spec(cfg.kind).hf_config(cfg)))
    reference, said = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = reference.eval()(draw_tokens()).logits
        torch.testing.assert_close(model(draw_tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_config_comes_back_from_both_forms_of_config_json(name: str) -> None:
    cfg = MODELS[name]
    written = json.loads(json.dumps(get_spec(cfg.kind).hf_config(cfg)))
    assert config_from_hf(written) == cfg
    by_transformers = json.loads(AutoConfig.for_model(**written).to_json_string())
    assert config_from_hf(by_transformers) == cfg


def test_tensors_of_further_predicted_tokens_are_passed_over(tmp_path: Path) -> None:
    hugging_face(DEEPSEEK).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours(DEEPSEEK, tensors | {"model.layers.3.eh_proj.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unknown: model\.layers\.2\.eh_proj\.weight"):
        ours(DEEPSEEK, tensors | {"model.layers.2.eh_proj.weight": torch.zeros(1)})


def test_a_missing_and_a_misshapen_expert_are_named(tmp_path: Path) -> None:
    hugging_face(MODELS["mixtral"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    matrix = tensors.pop(name)
    with pytest.raises(UserError, match="missing: " + name.replace(".", r"\.")):
        ours(MODELS["mixtral"], tensors)
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " has the shape"):
        ours(MODELS["mixtral"], tensors | {name: matrix[:, :-1]})


MIXTRAL = MODELS["mixtral"]
REFUSED = {
    "model.qk_norm": replace(MIXTRAL, qk_norm=True),
    "model.experts": replace(MIXTRAL, experts=None),
    "model.experts.routing": replace(MIXTRAL, experts=ExpertsConfig(routing="sigmoid")),
    "model.experts.first_k_dense": replace(MIXTRAL, experts=ExpertsConfig(first_k_dense=1)),
    "model.norm_eps": replace(DEEPSEEK, norm_eps=1e-5),
    "model.mla": replace(DEEPSEEK, mla=None),
    "model.experts.bias_rate": replace(DEEPSEEK, experts=replace(MOE, bias_rate=None)),
    "model.experts.n_shared_experts": replace(DEEPSEEK, experts=replace(MOE, n_shared_experts=0)),
    "model.experts.layer_frequency": replace(DEEPSEEK, experts=replace(MOE, layer_frequency=2)),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_hugging_face_cannot_express_is_refused_by_name(option: str) -> None:
    cfg = REFUSED[option]
    for function in (get_spec(cfg.kind).weights, get_spec(cfg.kind).hf_config):
        with pytest.raises(UserError, match=option.replace(".", r"\.") + "="):
            function(cfg)


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "router_jitter_noise": ("mixtral", {"router_jitter_noise": 0.1}),
    "rope_interleave": ("deepseek", {"rope_interleave": False}),
    "topk_method": ("deepseek", {"topk_method": "group_limited_greedy"}),
    "n_routed_experts": ("deepseek", {"n_routed_experts": ...}),
    "mscale_all_dim": (
        "deepseek",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_config_json_that_we_cannot_express_is_refused_by_name(key: str) -> None:
    name, changed = FOREIGN[key]
    hf = get_spec(MODELS[name].kind).hf_config(MODELS[name]) | changed
    with pytest.raises(UserError, match=key):
        config_from_hf({key: value for key, value in hf.items() if value is not ...})
