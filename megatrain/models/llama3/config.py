"""Llama 3 (arXiv 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.config import DecoderConfig


@config
class Llama3Config(DecoderConfig):
    kind: Literal["llama3"] = "llama3"
    vocab_size: int = 128256
    max_seq_len: int = 8192
    rope_theta: float = 500000.0
    tie_embeddings: bool = False
