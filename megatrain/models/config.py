"""The union of all model families' configs, selected by `kind`. Does not import torch."""

from megatrain.models.convnet.config import ConvNetConfig
from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.vit.config import ViTConfig

ModelConfig = (
    GPT2Config | Llama3Config | Qwen3Config | MixtralConfig | DeepseekV3Config | ViTConfig | ConvNetConfig
)
