"""Hidden states of texts: what a decoder has of each token before the head makes logits of it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatrain.models.runner import Runner, Work
from megatrain.nn.decoder import Decoder
from megatrain.nn.layer import replace_seam
from megatrain.nn.paged import PagedCache

TOKENS = 2048
"""Tokens of one pass, unless a single text has more."""
TEXTS = 64
"""Texts of one pass at most."""


class HiddenHead(nn.Module):
    """A `LossHead` that returns the hidden states as they are."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        keep: Tensor | None = None,
        *,
        factors: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return the states `(batch, kept, hidden)` of `hidden` `(batch, seq, hidden)`; see `LossHead`."""
        return hidden if keep is None else hidden[:, keep]


@contextlib.contextmanager
def hidden_states(decoder: Decoder) -> Iterator[None]:
    """Let a decoder return hidden states, after its final norm, in place of logits in the `with` block."""
    usual = decoder.loss_head
    replace_seam(decoder, "loss_head", HiddenHead())
    try:
        yield
    finally:
        replace_seam(decoder, "loss_head", usual)


class Embedder:
    """Makes one vector of each text."""

    def __init__(self, decoder: Decoder, *, context: int, pooling: str) -> None:
        """Take a decoder that is whole, in one process.

        Args:
            context: most tokens of a text. pooling: mean of the states of all tokens, or the last token's.
        """
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling must be mean or last, not {pooling!r}")
        self.decoder = decoder
        self.pooling = pooling
        cache = PagedCache(0)
        self.runner = Runner(decoder, PagedCache(cache.blocks_for(max(TOKENS, context)) + TEXTS))

    def vectors(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return a vector of length 1 for each text of at least one token, `(texts, hidden)` in float32 on the CPU.

        They pass through the model together: at most `TEXTS` with `TOKENS` tokens in all, or a single longer one.
        """
        works = [Work(n, 0, list(text), len(text)) for n, text in enumerate(texts)]
        with hidden_states(self.decoder):
            states, rows = self.runner.run(works)
        for n in range(len(works)):
            self.runner.cache.release(n)
        pooled = [states[row].mean(0) if self.pooling == "mean" else states[row][-1] for row in rows]
        return torch.nn.functional.normalize(torch.stack(pooled).float(), dim=-1).cpu()
