"""The union of all model families' configs; `kind` tells which one a run uses."""

from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config

ModelConfig = GPT2Config | Llama3Config | Qwen3Config
