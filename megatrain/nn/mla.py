"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one small vector."""

import torch
from torch import Tensor, nn

from megatrain.nn.attention import AttentionCore, SequenceInfo
from megatrain.nn.config import DecoderConfig
from megatrain.nn.layer import Linear
from megatrain.nn.norm import RMSNorm
from megatrain.nn.plan import attention_weights
from megatrain.nn.rope import rope_score_factor
from megatrain_kernels import rotary


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention, `(batch, seq, hidden)` to the same.

    Head counts come from the weights, so a shard of the heads works alone. `sliding_window` is the layer's.
    Of each query and key head the first `qk_nope_head_dim` numbers have no position; the rest are turned, and those of
    the key are shared by all heads.
    """

    SEAMS = ("core",)

    def __init__(self, cfg: DecoderConfig, sliding_window: int | None) -> None:
        super().__init__()
        mla = cfg.mla
        assert mla is not None
        self.sizes = [mla.qk_nope_head_dim, mla.qk_rope_head_dim]
        self.v_size = mla.v_head_dim
        self.is_q_compressed = mla.q_lora_rank is not None
        weights = attention_weights(cfg)
        if mla.q_lora_rank is None:
            self.wq = Linear(weights["wq"])
        else:
            self.wq_down, self.wq_up = Linear(weights["wq_down"]), Linear(weights["wq_up"])
            self.q_norm = RMSNorm(weights["q_norm"], cfg.norm_eps)
        self.wkv_down, self.wkv_up = Linear(weights["wkv_down"]), Linear(weights["wkv_up"])
        self.kv_norm = RMSNorm(weights["kv_norm"], cfg.norm_eps)
        self.wk_rope, self.wo = Linear(weights["wk_rope"]), Linear(weights["wo"])
        scale = rope_score_factor(cfg.rope_scaling) * cfg.qk_head_dim**-0.5
        self.core = AttentionCore(sliding_window, scale)

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        assert sequence.cos is not None
        assert sequence.sin is not None
        nope, rope = self.sizes
        q = self.wq_up(self.q_norm(self.wq_down(x))) if self.is_q_compressed else self.wq(x)
        q_nope, q_rope = q.unflatten(-1, (-1, nope + rope)).split(self.sizes, -1)
        kv = self.wkv_up(self.kv_norm(self.wkv_down(x))).unflatten(-1, (-1, nope + self.v_size))
        k_nope, v = kv.split([nope, self.v_size], -1)
        q_rope, k_rope = rotary(q_rope, self.wk_rope(x).unsqueeze(-2), sequence.cos, sequence.sin)
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], rope)], -1)
        out: Tensor = self.wo(self.core(q, k, v, sequence.doc_ids).flatten(-2))
        return out
