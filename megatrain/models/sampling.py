"""How the next token is chosen from a model's logits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from megatrain.config.ranges import Fraction, NonNegative, Positive, PositiveCount, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of one request are chosen. The options apply in the order in which they stand here."""

    repetition_penalty: Positive = 1.0
    """Factor by which logits of tokens that the text has already are divided if positive, multiplied if negative (CTRL,
    arXiv 1909.05858)."""
    temperature: NonNegative = 0.8
    """Divisor of the logits; 0: the likeliest token (greedy decoding)."""
    top_k: PositiveCount | None = None
    """Sample from the k likeliest tokens; null: from all."""
    top_p: Fraction | None = None
    """Sample from the fewest likeliest tokens with this total probability (nucleus sampling, arXiv 1904.09751)."""
    min_p: Fraction | None = None
    """Sample from the tokens with at least this share of the likeliest one's probability (arXiv 2407.01082)."""
    seed: Annotated[int, Range(at_least=0)] = 0
    """Seed of the request's own random numbers, so that its text does not depend on others in the batch."""


class Sampler:
    """The state of one request's choices: its random numbers, and the tokens that its text has."""

    def __init__(self, how: Sampling, prompt: Iterable[int]) -> None:
        self.how = how
        self._generator = torch.Generator().manual_seed(how.seed)
        self._seen = set(prompt) if how.repetition_penalty != 1 else set()

    @property
    def is_greedy(self) -> bool:
        """Whether the logits alone decide: nothing is drawn, and no earlier token counts."""
        return self.how.temperature == 0 and self.how.repetition_penalty == 1

    def see(self, token: int) -> None:
        """Take note that the text now has `token`."""
        if self.how.repetition_penalty != 1:
            self._seen.add(token)

    def probabilities(self, logits: Tensor, also: Iterable[int] = ()) -> Tensor:
        """Return the probability of each token, `(vocab,)` in float32 at least, from logits `(vocab,)` on the CPU.

        Args:
            also: tokens that the text would have, too.
        """
        how = self.how
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if how.repetition_penalty != 1 and (seen := self._seen.union(also)):
            places = torch.tensor(sorted(seen))
            own = scores[places]
            penalized = torch.where(own > 0, own / how.repetition_penalty, own * how.repetition_penalty)
            scores = scores.index_copy(0, places, penalized)
        if how.temperature == 0:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        if how.top_k is not None and how.top_k < scores.numel():
            scores = scores.masked_fill(scores < scores.topk(how.top_k).values[-1], float("-inf"))
        # A temperature may be so small that the quotients overflow, unless the largest is 0.
        found = torch.softmax((scores - scores.max()) / how.temperature, dim=-1)
        if how.top_p is not None:
            likeliest, token = found.sort(descending=True)
            up_to = likeliest.cumsum(0)
            found[token[1:][up_to[:-1] >= how.top_p]] = 0.0
            found /= found.sum()
        if how.min_p is not None:
            found[found < how.min_p * found.max()] = 0.0
            found /= found.sum()
        return found

    def draw(self, weights: Tensor) -> int:
        """Draw an index in proportion to `weights` `(n,)`."""
        return int(torch.multinomial(weights, 1, generator=self._generator))


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the model's own log-probabilities, before any option of sampling, of logits `(..., vocab)`."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
