"""Passes of a model over the new tokens of several sequences, whose earlier ones are in a paged cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatrain.models.sampling import Sampler
from megatrain.nn.paged import PackedStep, PagedAttention, PagedCache, Part


@dataclass
class Running:
    """A sequence that is being generated."""

    number: int
    tokens: list[int]
    """Prompt and what follows it so far."""
    sampler: Sampler
    cached: int = 0
    """Number of tokens whose keys and values are in the cache."""


class Work(NamedTuple):
    """New tokens of a sequence."""

    sequence: int
    start: int
    """Position of the first one, and number of those in the cache."""
    tokens: list[int]
    keep: int
    """Number of last tokens after which logits are wanted."""


class Runner:
    """A model and the cache of the sequences that pass through it.

    The model takes packed tokens `(1, tokens)` with `positions` alike and the places to `keep`, `(kept,)`, and returns
    logits `(1, kept, vocab)`: a `Decoder`, or what wraps one.
    """

    def __init__(self, model: nn.Module, cache: PagedCache) -> None:
        self.model = model
        self.cache = cache
        self.attention = PagedAttention(model)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> tuple[Tensor, list[slice]]:
        """Return the wanted logits `(kept, vocab)` on the model's device, and which rows of them each work has.

        Raises:
            OutOfBlocksError: the cache has too few free blocks.
        """
        order = sorted(range(len(works)), key=lambda n: (len(works[n].tokens), works[n].start > 0))
        tokens: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows = [slice(0)] * len(works)
        for n in order:
            work = works[n]
            tokens += work.tokens
            positions += range(work.start, work.start + len(work.tokens))
            rows[n] = slice(len(keep), len(keep) + work.keep)
            keep += range(len(tokens) - work.keep, len(tokens))
        parts = [Part(works[n].sequence, works[n].start, len(works[n].tokens)) for n in order]
        step = PackedStep(self.cache, parts, self.device)
        with self.attention.over(step):
            logits: Tensor = self.model(
                self._row(tokens), positions=self._row(positions), keep=torch.tensor(keep, device=self.device)
            )
        return logits[0], rows

    def _row(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device).unsqueeze(0)
