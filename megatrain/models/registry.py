"""From a config's `kind` to its family, imported when asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.spec import ModelSpec

FAMILIES = {
    "gpt2": "megatrain.models.gpt2.spec:SPEC",
    "llama3": "megatrain.models.llama3.spec:SPEC",
    "qwen3": "megatrain.models.qwen3.spec:SPEC",
    "mixtral": "megatrain.models.mixtral.spec:SPEC",
    "deepseek_v3": "megatrain.models.deepseek_v3.spec:SPEC",
}
HF_TYPES = {
    "gpt2": "gpt2",
    "llama": "llama3",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
    "deepseek_v3": "deepseek_v3",
}
"""Hugging Face's model_type -> our kind."""


def get_spec(kind: str) -> ModelSpec:
    """Return the family `kind`.

    Raises:
        UserError: there is none of that name.
    """
    if kind not in FAMILIES:
        raise UserError(f"model.kind={kind}: must be one of {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[kind].partition(":")
    spec: ModelSpec = getattr(import_module(module), name)
    return spec


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the model that a Hugging Face config.json (`hf`, parsed) describes.

    Raises:
        UserError: no family of ours can express it; the message names the key.
    """
    model_type = hf.get("model_type")
    if model_type not in HF_TYPES:
        raise UserError(f"config.json: model_type={model_type} must be one of {', '.join(HF_TYPES)}")
    cfg: ModelConfig = get_spec(HF_TYPES[model_type]).config_from_hf(hf)
    return cfg
