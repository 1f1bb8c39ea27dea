"""Qwen3 (arXiv 2505.09388): like Llama, with a norm over each query and key head and an independent head size."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.config import DecoderConfig


@config
class Qwen3Config(DecoderConfig):
    kind: Literal["qwen3"] = "qwen3"
    vocab_size: int = 151936
    max_seq_len: int = 40960
    norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    qk_norm: bool = True
