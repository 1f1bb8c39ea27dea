"""Mixtral (arXiv 2401.04088): like Llama, with experts in every layer, each of size `ffn_size`."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.config import DecoderConfig, ExpertsConfig


@config
class MixtralConfig(DecoderConfig):
    kind: Literal["mixtral"] = "mixtral"
    vocab_size: int = 32000
    max_seq_len: int = 32768
    rope_theta: float = 1000000.0
    tie_embeddings: bool = False
    experts: ExpertsConfig | None = ExpertsConfig()
