"""Logits equal transformers' on random small models, through the maps that import and export use."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import config_from_hf, get_spec
from megatrain.nn.config import RopeScaling
from megatrain.nn.rope import rope_frequencies, rope_magnitude

TINY: dict[str, Any] = {
    "n_layers": 2,
    "hidden_size": 48,
    "n_heads": 4,
    "ffn_size": 80,
    "vocab_size": 67,
    "max_seq_len": 64,
}
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=16)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)
BIASES: dict[str, Any] = {"attention_bias": True, "output_bias": True}
MODELS: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(**TINY),
    "gpt2, untied, gelu": GPT2Config(**TINY, tie_embeddings=False, activation="gelu"),
    "llama": Llama3Config(**TINY, n_kv_heads=2),
    "llama, biases, wide heads": Llama3Config(**TINY, **BIASES, mlp_bias=True, head_dim=24),
    "llama, tied, llama3 scaling": Llama3Config(
        **TINY, n_kv_heads=1, tie_embeddings=True, rope_scaling=LLAMA3
    ),
    "llama, linear scaling": Llama3Config(
        **TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0, original_max_seq_len=64)
    ),
    "llama, yarn": Llama3Config(**TINY, rope_scaling=YARN),
    "llama, yarn, own factor": Llama3Config(**TINY, rope_scaling=replace(YARN, attention_factor=0.9)),
    "qwen3": Qwen3Config(**TINY, n_kv_heads=2, head_dim=16),
    "qwen3, untied, window": Qwen3Config(
        **TINY, n_kv_heads=4, head_dim=12, tie_embeddings=False, sliding_window=9
    ),
    "qwen3, window in some layers": Qwen3Config(
        **TINY | {"n_layers": 4}, sliding_window=9, full_attention_every=2
    ),
    "qwen3, biases": Qwen3Config(**TINY, **BIASES),
}


def hugging_face(cfg: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**get_spec(cfg.kind).hf_config(cfg)))
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which start at 1 and 0
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def theirs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in get_spec(cfg.kind).build(cfg).named_parameters()}


def loaded(cfg: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return get_spec(cfg.kind).weights(cfg).load(tensors, shapes(cfg))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    cfg = MODELS[name]
    reference = hugging_face(cfg)
    model = get_spec(cfg.kind).build(cfg)
    model.load_state_dict(loaded(cfg, theirs(reference)))
    tokens = torch.randint(cfg.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_map_and_back_is_the_identity(name: str) -> None:
    cfg = MODELS[name]
    original = theirs(hugging_face(cfg))
    returned = get_spec(cfg.kind).weights(cfg).export(loaded(cfg, original))
    assert returned.keys() == original.keys()
    for key, value in original.items():
        assert torch.equal(returned[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_the_config_comes_back_from_both_forms_of_config_json(name: str) -> None:
    cfg = MODELS[name]
    if cfg.kind != "gpt2":  # config.json spells both out
        cfg = replace(cfg, n_kv_heads=cfg.kv_heads, head_dim=cfg.qk_head_dim)
    written = json.loads(json.dumps(get_spec(cfg.kind).hf_config(cfg)))
    assert config_from_hf(written) == cfg
    by_transformers = json.loads(AutoConfig.for_model(**written).to_json_string())
    assert "rope_scaling" not in by_transformers  # the newer form: rope_parameters
    assert config_from_hf(by_transformers) == cfg


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, RopeScaling(kind="linear", factor=3.0)])
@pytest.mark.parametrize(
    ("head_dim", "theta", "stretch"), [(64, 10_000.0, 1), (128, 500_000.0, 1024), (10, 1e6, 3)]
)
def test_frequencies(scaling: RopeScaling | None, head_dim: int, theta: float, stretch: int) -> None:
    if scaling is not None:
        scaling = replace(scaling, original_max_seq_len=16 * stretch)
    cfg = Llama3Config(**TINY, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    config = AutoConfig.for_model(**get_spec("llama3").hf_config(cfg))
    ours = rope_frequencies(head_dim, theta, scaling).float()
    if scaling is None:
        expected, expected_factor = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    # transformers' float32 powers are off by a few units in the last place.
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)
    assert rope_magnitude(scaling) == pytest.approx(expected_factor, rel=1e-12)


def test_files_of_older_versions() -> None:
    """Names without a prefix, the causal mask among the tensors, the tied head written twice."""
    cfg = MODELS["gpt2"]
    tensors = theirs(hugging_face(cfg))
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.1.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    old["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    twice = tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    for given in (old, twice):
        for name, tensor in loaded(cfg, tensors).items():
            assert torch.equal(loaded(cfg, given)[name], tensor)
    twice["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        loaded(cfg, twice)


def test_an_unknown_and_a_missing_tensor_are_named() -> None:
    cfg = MODELS["llama"]
    tensors = theirs(hugging_face(cfg))
    ours = loaded(cfg, tensors)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"missing: model\.norm\.weight; unknown: model\.extra\.weight"):
        loaded(cfg, tensors)
    ours["extra"] = ours.pop("norm.weight")
    with pytest.raises(UserError, match=r"missing: norm\.weight; unknown: extra"):
        get_spec("llama3").weights(cfg).export(ours)


@pytest.mark.parametrize(
    ("name", "tensor"), [("gpt2", "transformer.h.0.attn.c_attn.weight"), ("llama", "model.norm.weight")]
)
def test_a_wrong_shape_is_named(name: str, tensor: str) -> None:
    tensors = theirs(hugging_face(MODELS[name]))
    tensors[tensor] = tensors[tensor][..., :-1]
    with pytest.raises(UserError, match=tensor.replace(".", r"\.") + r" has the shape .*config"):
        loaded(MODELS[name], tensors)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding_window": ("llama3", {"sliding_window": 8}),
    "qk_norm": ("llama3", {"qk_norm": True}),
    "norm": ("qwen3", {"norm": "layer"}),
    "mlp_bias": ("qwen3", {"mlp_bias": True}),
    "output_bias": ("llama3", {"attention_bias": True}),
    "activation": ("gpt2", {"activation": "relu2"}),
    "positions": ("gpt2", {"positions": "rope"}),
    "kv_heads": ("gpt2", {"n_kv_heads": 1}),
    "qk_head_dim": ("gpt2", {"head_dim": 16}),
    "logit_softcap": ("qwen3", {"logit_softcap": 30.0}),
    "residual_scale": ("llama3", {"residual_scale": 0.5}),
    "embedding_scale": ("gpt2", {"embedding_scale": 2.0}),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_hugging_face_cannot_express_is_refused_by_name(option: str) -> None:
    kind, options = REFUSED[option]
    spec = get_spec(kind)
    classes: dict[str, Any] = {"gpt2": GPT2Config, "llama3": Llama3Config, "qwen3": Qwen3Config}
    cfg = classes[kind](**TINY, **options)
    for function in (spec.weights, spec.hf_config):
        with pytest.raises(UserError, match=rf"model\.{option}="):
            function(cfg)


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "model_type": ("llama", {"model_type": "mamba"}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "mscale": ("llama, yarn", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}),
    "partial_rotary_factor": ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}),
    "quantization_config": ("llama", {"quantization_config": {"bits": 4}}),
    "sliding_window": ("qwen3, untied, window", {"layer_types": None, "max_window_layers": 1}),
    "activation_function": ("gpt2", {"activation_function": "silu"}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "n_embd": ("gpt2", {"n_embd": ...}),
    "n_kv_heads": ("llama", {"num_key_value_heads": 3}),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_config_json_that_we_cannot_express_is_refused_by_name(key: str) -> None:
    name, changed = FOREIGN[key]
    hf = get_spec(MODELS[name].kind).hf_config(MODELS[name]) | changed
    with pytest.raises(UserError, match=key):
        config_from_hf({key: value for key, value in hf.items() if value is not ...})


def test_the_oldest_form_of_rotary_scaling() -> None:
    """`type` instead of `rope_type`, and no original length: transformers then takes the longest length."""
    hf = get_spec("llama3").hf_config(MODELS["llama"]) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    expected = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64)
    assert config_from_hf(hf).rope_scaling == expected
    standard = AutoConfig.for_model(**hf).rope_parameters
    assert standard["original_max_position_embeddings"] == 64


def test_a_window_is_read_without_layer_types() -> None:
    hf = get_spec("qwen3").hf_config(MODELS["qwen3, untied, window"])
    del hf["layer_types"]
    assert config_from_hf(hf).sliding_window == 9
    assert (
        config_from_hf(hf | {"max_window_layers": 2}).sliding_window is None
    )  # it would begin after the last layer


def test_other_patterns_of_windows_are_refused() -> None:
    hf = get_spec("qwen3").hf_config(MODELS["qwen3, window in some layers"])
    full, windowed = "full_attention", "sliding_attention"
    assert hf["layer_types"] == [windowed, full, windowed, full]
    assert config_from_hf(hf).full_attention_every == 2
    with pytest.raises(UserError, match="layer_types"):
        config_from_hf(hf | {"layer_types": [full, full, windowed, full]})


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match="mamba: must be one of gpt2, llama3, qwen3"):
        get_spec("mamba")
