"""The family DeepSeek-V3."""

from megatrain.models.deepseek_v3.weights import config_from_hf, hf_config, weight_map
from megatrain.models.spec import ModelSpec
from megatrain.nn.decoder import Decoder
from megatrain.nn.plan import decoder_plan

SPEC = ModelSpec(
    kind="deepseek_v3",
    hf_type="deepseek_v3",
    build=Decoder,
    plan=decoder_plan,
    weights=weight_map,
    hf_config=hf_config,
    config_from_hf=config_from_hf,
)
