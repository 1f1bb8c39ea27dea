"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases, tied embeddings."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.config import DecoderConfig


@config
class GPT2Config(DecoderConfig):
    kind: Literal["gpt2"] = "gpt2"
    vocab_size: int = 50257
    max_seq_len: int = 1024
    norm: Literal["rms", "layer"] = "layer"
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "gelu_tanh"
    positions: Literal["rope", "learned"] = "learned"
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
