"""The family Llama 3."""

from megatrain.models.llama3.weights import config_from_hf, hf_config, weight_map
from megatrain.models.spec import ModelSpec
from megatrain.nn.decoder import Decoder
from megatrain.nn.plan import decoder_plan

SPEC = ModelSpec(
    kind="llama3",
    hf_type="llama",
    build=Decoder,
    plan=decoder_plan,
    weights=weight_map,
    hf_config=hf_config,
    config_from_hf=config_from_hf,
)
