"""Registry of model families by `kind`, imported on demand.

A family is a folder `models/<kind>/` with a `spec.py`, and a member of the union in `models/config.py`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

from megatrain.config.errors import UserError
from megatrain.config.load import kind_of
from megatrain.models.config import ModelConfig
from megatrain.models.spec import ModelSpec

KINDS = tuple(kind_of(member) for member in get_args(ModelConfig))
"""Names of the model families."""


def get_spec(kind: str) -> ModelSpec:
    """Return the family `kind`.

    Raises:
        UserError: there is no such family.
    """
    if kind not in KINDS:
        raise UserError(f"model.kind={kind}: must be one of {', '.join(KINDS)}")
    spec: ModelSpec = import_module(f"megatrain.models.{kind}.spec").SPEC
    return spec


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the model that a Hugging Face config.json (`hf`, parsed) describes.

    Raises:
        UserError: no family can express it; the message names the key.
    """
    specs = {spec.hf_type: spec for spec in map(get_spec, KINDS)}
    model_type = hf.get("model_type")
    if model_type not in specs:
        raise UserError(f"config.json: model_type={model_type} must be one of {', '.join(specs)}")
    cfg: ModelConfig = specs[model_type].config_from_hf(hf)
    return cfg
