"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one small vector."""

import torch
from torch import Tensor, nn

from megatrain.nn.attention import AttentionCore, SequenceInfo
from megatrain.nn.config import DecoderConfig
from megatrain.nn.norm import RMSNorm
from megatrain.nn.rope import rope_score_factor
from megatrain_kernels import rotary


class MultiHeadLatentAttention(nn.Module):
    """`(batch, seq, hidden)` to the same. Head counts come from the weights, so a shard of them works alone.

    Of each query and key head the first `qk_nope_head_dim` numbers have no position; the rest are turned, and those of
    the key are shared by all heads.
    """

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        mla = cfg.mla
        assert mla is not None
        self.sizes = [mla.qk_nope_head_dim, mla.qk_rope_head_dim]
        self.v_size = mla.v_head_dim
        self.is_q_compressed = mla.q_lora_rank is not None
        q_size = cfg.n_heads * cfg.qk_head_dim
        if mla.q_lora_rank is None:
            self.wq = nn.Linear(cfg.hidden_size, q_size, bias=False)
        else:
            self.wq_down = nn.Linear(cfg.hidden_size, mla.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(mla.q_lora_rank, cfg.norm_eps)
            self.wq_up = nn.Linear(mla.q_lora_rank, q_size, bias=False)
        self.wkv_down = nn.Linear(cfg.hidden_size, mla.kv_lora_rank, bias=False)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, cfg.norm_eps)
        kv_size = cfg.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.wkv_up = nn.Linear(mla.kv_lora_rank, kv_size, bias=False)
        self.wk_rope = nn.Linear(cfg.hidden_size, mla.qk_rope_head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * mla.v_head_dim, cfg.hidden_size, bias=False)
        self.core = AttentionCore(
            cfg.sliding_window, rope_score_factor(cfg.rope_scaling) * cfg.qk_head_dim**-0.5
        )

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
