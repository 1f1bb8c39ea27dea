"""Classifiers of images: a Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), and one with convolutions."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.nn.attention import SequenceInfo
from megatrain.nn.decoder import Decoder
from megatrain.nn.image_config import ConvolutionConfig, ImageModelConfig
from megatrain.nn.layer import Linear
from megatrain.nn.plan import decoder_plan

OwnPositions = Callable[[Tensor], Tensor]


def all_positions(hidden: Tensor) -> Tensor:
    """Return `hidden` `(batch, positions, hidden)` as it is: this device has all positions."""
    return hidden


class ImageClassifier(Decoder):
    """Bytes of images to logits of classes, or to the loss.

    Blocks see a position for each patch, and `registers` more. The last of these is classified: of a Vision Transformer
    as it is, of a model with convolutions the mean of all patches in its place.
    """

    SEAMS: ClassVar[tuple[str, ...]] = ("loss_head", "own_positions")

    def __init__(self, cfg: ImageModelConfig) -> None:
        super().__init__(cfg)
        self.image = cfg
        self.patch: Linear | None = Linear(decoder_plan(cfg).ends["patch"])
        self.own_positions: OwnPositions = all_positions

    def keep_layers(self, layers: range) -> None:
        """Do as `Decoder.keep_layers`."""
        super().keep_layers(layers)
        if layers.start > 0:
            self.patch = None

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
        """Do as `Decoder.forward`, with one image in each row; logits are `(batch, 1, classes)`.

        Losses of each token are `(batch, seq)`, of which all but the last are 0.

        Args:
            tokens: `(batch, image_bytes + 1)` int64, or hidden states `(batch, positions, hidden)`. teacher: must be
                None.
        """
        assert teacher is None
        hidden = tokens if tokens.is_floating_point() else self.own_positions(self._patches(tokens))
        sequence = SequenceInfo(None, None, None, None)
        for _, block in self.blocks():
            hidden = block(hidden, sequence)
        if self.norm is None:
            return hidden
        if isinstance(self.image, ConvolutionConfig):
            rows, columns = self.image.patches
            hidden = hidden[:, : rows * columns].mean(1, keepdim=True).expand_as(hidden)
        hidden = self.norm(hidden)
        assert self.classifier is not None
        n = self.image.n_positions
        last = torch.tensor([n - 1], device=hidden.device)
        wanted = None if targets is None else F.pad(targets[:, -1:], (n - 1, 0), value=-100)
        scale = None if factors is None else F.pad(factors[:, -1:], (n - 1, 0))
        out: Tensor = self.loss_head(
            hidden,
            self.classifier.tensor("weight"),
            wanted,
            z_loss,
            last if targets is None else None,
            factors=scale,
            per_token=per_token,
        )
        if targets is None or not per_token:
            return out
        return F.pad(out[:, -1:], (targets.shape[1] - 1, 0))

    def _patches(self, tokens: Tensor) -> Tensor:
        """Return the hidden states of all positions, from bytes `(batch, image_bytes + 1)`."""
        cfg, side = self.image, self.image.patch_size
        assert self.patch is not None
        assert self.pos_embed is not None
        rows, columns = cfg.patches
        table = self.pos_embed.tensor("weight")
        pixels = tokens[:, : cfg.image_bytes].to(table.dtype) / 127.5 - 1
        grid = pixels.unflatten(1, (rows, side, columns, side, cfg.image_channels))
        patches = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return F.pad(self.patch(patches), (0, 0, 0, cfg.registers)) + table
