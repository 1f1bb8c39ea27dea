"""The contract between model and techniques: the plan states what the model has; only declared seams are replaced."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatrain.cli.compose import compose
from megatrain.models.registry import KINDS, get_spec
from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig
from megatrain.nn.contract import Role
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.layer import Layer, replace_seam
from megatrain.nn.plan import decoder_plan

SMALL = {"n_layers": 3, "hidden_size": 32, "n_heads": 4, "ffn_size": 48, "vocab_size": 64}
CONFIGS = {
    "llama": DecoderConfig(**SMALL, n_kv_heads=2, tie_embeddings=False),  # type: ignore[arg-type]
    "gpt2": DecoderConfig(
        **SMALL,  # type: ignore[arg-type]
        norm="layer",
        positions="learned",
        activation="gelu_tanh",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "qk_norm": DecoderConfig(**SMALL, qk_norm=True, head_dim=16),  # type: ignore[arg-type]
    "experts": DecoderConfig(
        **SMALL, experts=ExpertsConfig(n_experts=4, n_shared_experts=1, first_k_dense=1)
    ),  # type: ignore[arg-type]
    "mla": DecoderConfig(**SMALL, mla=MLAConfig(q_lora_rank=24, kv_lora_rank=16)),  # type: ignore[arg-type]
    "mla, plain queries": DecoderConfig(**SMALL, mla=MLAConfig(q_lora_rank=None, kv_lora_rank=16)),  # type: ignore[arg-type]
}
PRESETS = sorted(path.stem for path in (Path(__file__).parents[3] / "conf" / "model").glob("*.yaml"))


def held(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_states_what_the_model_has(name: str) -> None:
    with torch.device("meta"):
        assert held(Decoder(CONFIGS[name])) == decoder_plan(CONFIGS[name]).shapes


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_of_every_preset_states_what_it_has(preset: str) -> None:
    words = [] if preset in ("vit", "convnet") else ["seq_len=64", "data=synthetic"]
    cfg = compose([f"model={preset}", *words]).model
    spec = get_spec(cfg.kind)
    with torch.device("meta"):
        assert held(spec.build(cfg)) == spec.plan(cfg).shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_in_a_layer_that_techniques_can_see(name: str) -> None:
    """A parameter outside of a `Layer` would be a DTensor to its module's forward under tensor parallelism."""
    with torch.device("meta"):
        model = Decoder(CONFIGS[name])
    for parent in model.modules():
        if list(parent.parameters(recurse=False)):
            assert isinstance(parent, Layer), type(parent)


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_that_decide_numbers(name: str) -> None:
    """Written out here as names, which the model's code no longer uses."""
    plan = decoder_plan(CONFIGS[name])
    outputs = ("attn.wo", "mlp.down", "experts.down", "shared.down")
    for parameter, role in plan.roles.items():
        module = parameter.removesuffix(".weight").removesuffix(".bias")
        assert bool(role & Role.BRANCH_OUTPUT) == module.endswith(outputs)
        assert bool(role & Role.NORM) == module.endswith("norm"), parameter
        assert bool(role & Role.EMBEDDING) == (module in ("embed", "pos_embed")), parameter
        assert bool(role & Role.VOCABULARY) == (module in ("embed", "head")), parameter
        assert bool(role & Role.EXPERT) == (".moe.experts." in module), parameter
    assert plan.tied_embedding == (None if name == "llama" else "embed.weight")


def test_an_unknown_parameter_is_an_error() -> None:
    model = Decoder(CONFIGS["llama"])
    model.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(KeyError, match="extra"):
        init_weights(model, decoder_plan(model.cfg), seed=0)


def test_only_declared_seams_are_replaced() -> None:
    model = Decoder(CONFIGS["llama"])
    with pytest.raises(TypeError, match="Decoder has no seam 'forward'"):
        replace_seam(model, "forward", None)
    with pytest.raises(TypeError, match="Linear has no seam 'core'"):
        replace_seam(model.head, "core", None)  # type: ignore[arg-type]


def test_families_are_found_by_their_folders() -> None:
    folders = {
        path.parent.name for path in (Path(__file__).parents[3] / "megatrain" / "models").glob("*/spec.py")
    }
    assert folders == set(KINDS)
