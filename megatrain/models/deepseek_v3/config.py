"""DeepSeek-V3 (arXiv 2412.19437) without multi-token prediction: multi-head latent attention and many experts."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig


@config
class DeepseekV3Config(DecoderConfig):
    kind: Literal["deepseek_v3"] = "deepseek_v3"
    vocab_size: int = 129280
    max_seq_len: int = 163840
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    mla: MLAConfig | None = MLAConfig()
    experts: ExpertsConfig | None = ExpertsConfig(
        n_experts=256,
        top_k=8,
        ffn_size=2048,
        n_shared_experts=1,
        routing="sigmoid",
        routed_scale=2.5,
        n_groups=8,
        top_groups=4,
        aux_loss=1e-4,
        bias_rate=1e-3,
        first_k_dense=3,
    )
