"""The decoder Transformer that all families share; a family is a config and a map of names."""

import torch
from torch import Tensor, nn

from megatrain.nn.attention import SequenceInfo
from megatrain.nn.block import Block
from megatrain.nn.config import DecoderConfig
from megatrain.nn.embed import Embedding
from megatrain.nn.loss import LossHead
from megatrain.nn.norm import make_norm
from megatrain.nn.rope import rope_angles


class Decoder(nn.Module):
    """Tokens to logits, or to the summed loss. Layers are keyed by their index in the whole model.

    Parts may be taken out. Without its first layers it takes hidden states for tokens, without `norm` it returns them.
    """

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed: nn.Module | None = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.pos_embed = Embedding(cfg.max_seq_len, cfg.hidden_size) if cfg.positions == "learned" else None
        self.layers = nn.ModuleDict({str(index): Block(cfg, index) for index in range(cfg.n_layers)})
        self.norm: nn.Module | None = make_norm(cfg)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.loss_head = LossHead(cfg.logit_softcap)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits `(batch, seq, vocab)`, or with `targets` the loss summed over valid ones (float32 scalar).

        Args:
            tokens: `(batch, seq)` int64, or hidden states `(batch, seq, hidden)`. targets: `(batch, seq)`, -100 where
                there is none.
            positions: `(batch, seq)`; None counts from 0.
            doc_ids: `(batch, seq)`; attention stays inside a document.
            z_loss: factor on the squared log-partition.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = tokens if tokens.is_floating_point() else self._embed(tokens, positions)
        sequence = self._sequence_info(positions, doc_ids)
        for block in self.layers.values():
            hidden = block(hidden, sequence)
        if self.norm is None:
            return hidden
        hidden = self.norm(hidden)
        table = self.embed if self.head is None else self.head
        assert table is not None
        out: Tensor = self.loss_head(hidden, table.weight, targets, z_loss)
        return out

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self.embed is not None
        hidden: Tensor = self.embed(tokens)
        if self.cfg.embedding_scale != 1:
            hidden = hidden * self.cfg.embedding_scale
        return hidden if self.pos_embed is None else hidden + self.pos_embed(positions)

    def _sequence_info(self, positions: Tensor, doc_ids: Tensor | None) -> SequenceInfo:
        if self.cfg.positions == "learned":
            return SequenceInfo(None, None, doc_ids)
        cos, sin = rope_angles(positions, self.cfg.rope_size, self.cfg.rope_theta, self.cfg.rope_scaling)
        return SequenceInfo(cos, sin, doc_ids)
