"""Log-likelihoods of texts under a model, many texts in one pass."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from megatrain.config.errors import UserError
from megatrain.models.runner import Runner, Work
from megatrain.models.sampling import log_probabilities
from megatrain.nn.paged import PagedCache
from megatrain.runtime.processes import Processes
from megatrain.train.copies import copies_of
from megatrain.train.inference import TrainedModel

TOKENS = 2048
"""Tokens of one pass, unless a single text has more: their logits are in memory together."""
TEXTS = 64
"""Texts of one pass at most."""


class Score(NamedTuple):
    """How likely a continuation is after its context."""

    nats: float
    """Log-likelihood."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


class Scorer:
    """Scores continuations with a model; in several processes, all call it with the same ones."""

    def __init__(self, trained: TrainedModel, processes: Processes | None = None) -> None:
        """Prepare for it. `processes` are those that have the model, together or in copies; None: this one has it."""
        self.trained = trained
        self.copies = copies_of(trained, processes or Processes())

    @cached_property
    def runner(self) -> Runner:
        """The model with a cache in the place of its attention's keys; models of images are asked without."""
        cache = PagedCache(0)
        longest = max(TOKENS, self.trained.context)
        return Runner(self.trained.packed(), PagedCache(cache.blocks_for(longest) + TEXTS))

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what follows it, cut where they are tokens of the text as a whole.

        Spaces at the end of the context belong to what follows: tokenizers join them with the next word. Without a
        context, the text begins a document.
        """
        tokenizer = self.trained.tokenizer
        bare = context.rstrip(" ")
        continuation = context[len(bare) :] + continuation
        before = tokenizer.encode(bare)
        whole = tokenizer.encode(bare + continuation)
        return before or [tokenizer.eos_id], whole[len(before) :]

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Return the score of each continuation after its context, both in tokens.

        Of a context that is too long for the model the end is taken.

        Raises:
            UserError: a continuation is longer than what the model sees.
        """
        longest = max((len(after) for _, after in pairs), default=0)
        if longest > self.trained.context:
            raise UserError(
                f"a text of {longest} tokens is to be scored as one, but the model sees {self.trained.context}"
            )
        return self.copies.share(pairs, self._scores)

    def last_logits(self, texts: Sequence[list[int]]) -> list[Tensor]:
        """Return the logits after the last token of each text, `(outputs,)` on the CPU; of one that is too long its end
        is taken."""
        return self.copies.share(texts, self._last_logits)

    def _last_logits(self, texts: Sequence[list[int]]) -> list[Tensor]:
        seen = [tokens[-self.trained.context :] for tokens in texts]
        found: dict[int, Tensor] = {}
        for numbers in batches({n: len(tokens) for n, tokens in enumerate(seen)}):
            logits, rows = self.runner.run([Work(n, 0, seen[n], 1) for n in numbers])
            host = logits.cpu()
            for n, row in zip(numbers, rows, strict=True):
                self.runner.cache.release(n)
                found[n] = host[row][0]
        return [found[n] for n in range(len(texts))]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        found = [Score(0.0, True)] * len(pairs)
        inputs: dict[int, tuple[list[int], list[int]]] = {}
        for n, (before, after) in enumerate(pairs):
            if after:
                inputs[n] = ((before + after)[:-1][-self.trained.context :], after)
        for numbers in batches({n: len(tokens) for n, (tokens, _) in inputs.items()}):
            works = [Work(n, 0, inputs[n][0], len(inputs[n][1])) for n in numbers]
            logits, rows = self.runner.run(works)
            for n, row in zip(numbers, rows, strict=True):
                self.runner.cache.release(n)
                found[n] = _score(logits[row], inputs[n][1])
        return found


def batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield the numbers of the texts of each pass: those of about equal length, which is in tokens, together."""
    batch: list[int] = []
    tokens = 0
    for n in sorted(lengths, key=lambda n: lengths[n]):
        if batch and (tokens + lengths[n] > TOKENS or len(batch) == TEXTS):
            yield batch
            batch, tokens = [], 0
        batch.append(n)
        tokens += lengths[n]
    if batch:
        yield batch


def _score(logits: Tensor, tokens: list[int]) -> Score:
    wanted = logits.new_tensor(tokens).long()
    likely = log_probabilities(logits).gather(1, wanted[:, None]).double().sum()
    return Score(float(likely), bool((logits.argmax(-1) == wanted).all()))
