"""What the families of image models share: they have no form at Hugging Face here."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.errors import UserError
from megatrain.models.spec import ModelSpec, WeightMap
from megatrain.nn.image import ImageClassifier
from megatrain.nn.image_config import ImageModelConfig
from megatrain.nn.plan import decoder_plan


def _refuse(cfg: ImageModelConfig) -> Any:
    raise UserError(
        "A model of images is not written in Hugging Face's format. `megatrain checkpoint consolidate` writes its "
        "weights as safetensors."
    )


def _none_from_hf(hf: Mapping[str, Any]) -> Any:
    raise UserError("No model of images is read from Hugging Face's format.")


def _weights(cfg: ImageModelConfig) -> WeightMap:
    found: WeightMap = _refuse(cfg)
    return found


def image_spec(kind: str) -> ModelSpec:
    """Return the family `kind` of image models."""
    return ModelSpec(
        kind=kind,
        hf_type=f"megatrain-{kind}",
        build=ImageClassifier,
        plan=decoder_plan,
        weights=_weights,
        hf_config=_refuse,
        config_from_hf=_none_from_hf,
    )
