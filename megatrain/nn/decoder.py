"""The decoder Transformer that all families share; a family is a config and a map of names."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatrain.nn.attention import SequenceInfo
from megatrain.nn.block import Block
from megatrain.nn.classifier import ClassifierHead
from megatrain.nn.config import DecoderConfig
from megatrain.nn.embed import Embedding
from megatrain.nn.layer import Linear
from megatrain.nn.loss import LossHead
from megatrain.nn.norm import LayerNorm, RMSNorm, make_norm
from megatrain.nn.plan import decoder_plan
from megatrain.nn.rope import rope_angles


class Decoder(nn.Module):
    """Tokens to logits, or to the summed loss. Layers are keyed by their index in the full model.

    A pipeline stage is a decoder that kept a part of its layers (`keep_layers`): without the first layer it takes
    hidden states instead of tokens, without the last one it returns hidden states.
    """

    SEAMS: ClassVar[tuple[str, ...]] = ("loss_head",)

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        ends = decoder_plan(cfg).ends
        self.embed: Embedding | None = Embedding(ends["embed"]) if "embed" in ends else None
        self.pos_embed = Embedding(ends["pos_embed"]) if "pos_embed" in ends else None
        self.layers = nn.ModuleDict({str(index): Block(cfg, index) for index in range(cfg.n_layers)})
        self.norm: RMSNorm | LayerNorm | None = make_norm(cfg, ends["norm"])
        self.head = Linear(ends["head"]) if "head" in ends else None
        self.classifier = Linear(ends["classifier"]) if "classifier" in ends else None
        self.loss_head: nn.Module
        if cfg.classifier is None:
            self.loss_head = LossHead(cfg.logit_softcap)
        else:
            self.loss_head = ClassifierHead(cfg.classifier)

    @property
    def n_logits(self) -> int:
        """Number of logits of a token: those of the vocabulary, or of the classes."""
        return self.cfg.vocab_size if self.cfg.classifier is None else self.cfg.classifier.n_classes

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Yield (index in the full model, block) in order."""
        for index, block in self.layers.items():
            assert isinstance(block, Block)
            yield int(index), block

    def keep_layers(self, layers: range) -> None:
        """Become the pipeline stage that holds `layers`: delete all parameters that it does not need.

        The stage of the first layer keeps the embeddings, that of the last one the final norm and the head. A tied
        embedding is kept by both.
        """
        for index, _ in list(self.blocks()):
            if index not in layers:
                del self.layers[str(index)]
        is_last = layers.stop == self.cfg.n_layers
        if layers.start > 0:
            self.pos_embed = None
            if not (is_last and self.cfg.tie_embeddings and self.classifier is None):
                self.embed = None
        if not is_last:
            self.norm = None
            self.head = None
            self.classifier = None

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        token_numbers: Tensor | None = None,
        z_loss: float = 0.0,
        keep: Tensor | None = None,
        factors: Tensor | None = None,
        per_token: bool = False,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Return logits `(batch, seq, vocab)`, or with `targets` the loss summed over valid ones (float32 scalar).

        A classifier's logits are `(batch, seq, classes)`.

        Args:
            tokens: `(batch, seq)` int64, or hidden states `(batch, seq, hidden)`. targets: `(batch, seq)`, -100 where
                there is none.
            positions: `(batch, seq)`; None counts from 0.
            doc_ids: `(batch, seq)`; attention stays inside a document.
            token_numbers: `(batch, seq)` int64 in training with dropout: each token's number in the run.
            z_loss: factor on the squared log-partition.
            keep: `(kept,)` indices of the tokens of a row whose logits are wanted; None: all.
            factors, per_token: as in `LossHead.forward`. teacher: for a loss head that compares with it.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = tokens if tokens.is_floating_point() else self._embed(tokens, positions)
        sequence = self._sequence_info(positions, doc_ids)._replace(token_numbers=token_numbers)
        for _, block in self.blocks():
            hidden = block(hidden, sequence)
        if self.norm is None:
            return hidden
        hidden = self.norm(hidden)
        table = self.classifier or self.head or self.embed
        assert table is not None
        weight = table.tensor("weight")
        more = {} if teacher is None else {"teacher": teacher}
        out: Tensor = self.loss_head(
            hidden, weight, targets, z_loss, keep, factors=factors, per_token=per_token, **more
        )
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
