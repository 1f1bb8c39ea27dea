"""Logits equal transformers' on random small models, through the name map that import and export use."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import get_spec
from megatrain.nn.config import RopeScaling

TINY = {"n_layers": 2, "hidden_size": 48, "n_heads": 4, "ffn_size": 80, "vocab_size": 67, "max_seq_len": 64}
LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=16)
MODELS: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(**TINY),
    "llama": Llama3Config(**TINY, n_kv_heads=2),
    "llama, tied, llama3 scaling": Llama3Config(
        **TINY, n_kv_heads=1, tie_embeddings=True, rope_scaling=LLAMA3_SCALING
    ),
    "llama, linear scaling": Llama3Config(**TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "llama, yarn": Llama3Config(
        **TINY, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)
    ),
    "qwen3": Qwen3Config(**TINY, n_kv_heads=2, head_dim=16),
    "qwen3, untied": Qwen3Config(**TINY, n_kv_heads=4, head_dim=12, tie_embeddings=False),
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


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    cfg = MODELS[name]
    reference = hugging_face(cfg)
    spec = get_spec(cfg.kind)
    model = spec.build(cfg)
    shapes = {key: value.shape for key, value in model.named_parameters()}
    model.load_state_dict(spec.weights(cfg).load(theirs(reference), shapes))
    tokens = torch.randint(cfg.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_map_and_back_is_the_identity(name: str) -> None:
    cfg = MODELS[name]
    original = theirs(hugging_face(cfg))
    spec = get_spec(cfg.kind)
    shapes = {key: value.shape for key, value in spec.build(cfg).named_parameters()}
    weight_map = spec.weights(cfg)
    returned = weight_map.export(weight_map.load(original, shapes))
    assert returned.keys() == original.keys()
    for key, value in original.items():
        assert torch.equal(returned[key], value)


def test_an_unknown_and_a_missing_tensor_are_named() -> None:
    cfg = MODELS["llama"]
    spec = get_spec(cfg.kind)
    tensors = theirs(hugging_face(cfg))
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"missing: model\.norm\.weight; unknown: model\.extra\.weight"):
        spec.weights(cfg).load(tensors, {})


def test_what_hugging_face_cannot_express_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"model\.window=8"):
        get_spec("qwen3").weights(Qwen3Config(**TINY, window=8))
