"""Speculative decoding (arXiv 2211.17192): tokens are guessed cheaply, and one pass of the model checks them all.

The distribution of the text is that of the model alone: a guess is kept with the probability that makes it so.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megatrain.models.runner import Runner, Running, Work
from megatrain.nn.paged import PagedCache

LONGEST_MATCH = 3
"""Tokens of the text's end that are looked for in the text before: longer matches first."""


class Draft(NamedTuple):
    """Guesses of a sequence's next tokens."""

    tokens: list[int]
    probabilities: list[Tensor]
    """From which each was drawn, `(vocab,)` on the CPU; empty: none was drawn."""


class Drafter(Protocol):
    """What guesses tokens."""

    def draft(self, sequences: Sequence[Running], counts: Sequence[int]) -> list[Draft]:
        """Guess up to that many tokens of each sequence."""

    def forget(self, number: int) -> None:
        """Give up what is kept of a sequence, if anything is."""


class LookUp:
    """Guesses by n-gram look-up: that the text goes on as it did after the same words before."""

    def draft(self, sequences: Sequence[Running], counts: Sequence[int]) -> list[Draft]:
        """Guess what followed the latest earlier occurrence of the text's last tokens."""
        return [Draft(_repeat(each.tokens, n), []) for each, n in zip(sequences, counts, strict=True)]

    def forget(self, number: int) -> None:
        """Do nothing: nothing is kept."""


def _repeat(tokens: list[int], count: int) -> list[int]:
    text = np.array(tokens)
    for size in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        places = np.flatnonzero((windows == text[-size:]).all(1))
        if len(places):
            after = int(places[-1]) + size
            return tokens[after : after + count]
    return []


class DraftModel:
    """Guesses by a smaller model with the same tokens, which samples them as the request says."""

    def __init__(self, model: nn.Module, *, context: int, n_blocks: int) -> None:
        """Take the model, the most tokens that it sees, and the size of its cache."""
        self.context = context
        self.runner = Runner(model, PagedCache(n_blocks))
        self._cached: dict[int, int] = {}

    def draft(self, sequences: Sequence[Running], counts: Sequence[int]) -> list[Draft]:
        """Draw tokens one after the other, of all sequences together."""
        drafts = [Draft([], []) for _ in sequences]
        counts = [min(n, self.context - len(each.tokens)) for each, n in zip(sequences, counts, strict=True)]
        while live := [n for n, draft in enumerate(drafts) if len(draft.tokens) < counts[n]]:
            works = [self._work(sequences[n], drafts[n]) for n in live]
            logits, rows = self.runner.run(works)
            logits = logits.cpu()
            for n, work, row in zip(live, works, rows, strict=True):
                sampler = sequences[n].sampler
                found = sampler.probabilities(logits[row][0], drafts[n].tokens)
                drafts[n].tokens.append(sampler.draw(found))
                drafts[n].probabilities.append(found)
                self._cached[work.sequence] = work.start + len(work.tokens)
        return drafts

    def _work(self, sequence: Running, draft: Draft) -> Work:
        # Of the guesses before this draft only those that were kept count; the last token was not one of them.
        known = self._cached.get(sequence.number, 0)
        start = known if draft.tokens else min(known, len(sequence.tokens) - 1)
        return Work(sequence.number, start, (sequence.tokens + draft.tokens)[start:], 1)

    def forget(self, number: int) -> None:
        """Release the blocks of a sequence."""
        self._cached.pop(number, None)
        self.runner.cache.release(number)


def verified(
    draft: Draft, probabilities: Callable[[int], Tensor], draw: Callable[[Tensor], int]
) -> list[int]:
    """Return the guesses that are kept, and one more token: distributed as if the model had drawn them one by one.

    A guess x from the distribution q is kept with probability min(1, p(x) / q(x)); the token in place of the first one
    that is not is drawn from max(0, p - q), normalized (arXiv 2211.17192, section 2.3). A guess that was not drawn has
    q(x) = 1.

    Args:
        probabilities: returns p after the first n guesses, `(vocab,)`.
        draw: draws an index in proportion to weights.
    """
    for n, token in enumerate(draft.tokens):
        p = probabilities(n)
        if draft.probabilities:
            q = draft.probabilities[n].to(p.dtype)
        else:
            q = torch.zeros_like(p).index_fill_(0, torch.tensor(token), 1.0)
        share = min(1.0, float(p[token] / q[token]))
        if share == 1 or (share > 0 and draw(torch.tensor([1 - share, share], dtype=torch.float64))):
            continue
        rest = (p - q).clamp(min=0)
        return [*draft.tokens[:n], draw(rest if rest.sum() > 0 else p)]
    return [*draft.tokens, draw(probabilities(len(draft.tokens)))]
