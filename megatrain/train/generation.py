"""Generation of text: from prompts to their continuations, piece by piece or all at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from megatrain.data.tokenizer import Tokenizer
from megatrain.models.generate import MAX_BATCH, Finish, Generation, Produced, Request, blocks_needed
from megatrain.models.sampling import Sampling

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of a character whose bytes are not complete."""
WINDOW = 32
"""Tokens after which a text is not decoded anew from its beginning, but from near its end."""
BEFORE = 8
"""Tokens before those, which are decoded with them: what a token means may depend on what it follows."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A prompt and how it is to be continued."""

    prompt: str
    """An empty one starts a new document."""
    ids: tuple[int, ...] | None = None
    """The prompt in tokens, if these are not to be those of its text."""
    tokens: int
    """Most tokens of the continuation."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts before which the continuation ends."""
    ends: frozenset[int] = frozenset()
    """Further tokens that end it, beside the one that ends a document."""
    logprobs: int | None = None
    """As in `Request`."""

    def for_model(self, tokenizer: Tokenizer) -> Request:
        """Return the request in tokens, which also ends where a document does."""
        return Request(
            prompt=(tokenizer.encode(self.prompt) if self.ids is None else self.ids) or [tokenizer.eos_id],
            max_new_tokens=self.tokens,
            sampling=self.sampling,
            stop=self.ends | {tokenizer.eos_id},
            logprobs=self.logprobs,
        )


@dataclass
class Continuation:
    """What has come of a request so far."""

    request: TextRequest
    tokenizer: Tokenizer
    produced: list[Produced] = field(default_factory=list)
    text: str = ""
    """What cannot change any more: neither the rest of a character nor of a stop text is still to come."""
    finish: Finish = ""
    """stop: at the end of the document or a stop text; length: at the most tokens; empty: not yet."""
    tokens: list[int] = field(default_factory=list)
    """Ids of the tokens, including those of a stop text."""
    _settled: str = ""
    """Text of the tokens before the present window, which ends with a whole character."""
    _first: int = 0
    """Place of the window's first token."""
    _known: int = 0
    """Characters of the `BEFORE` tokens before it."""

    def take(self, produced: Produced) -> str:
        """Take in the next token; returns the text that it completes."""
        self.produced.append(produced)
        if produced.token is not None:
            self.tokens.append(produced.token)
        whole = self._decoded()
        ends = [place for stop in self.request.stop if (place := whole.find(stop)) >= 0]
        if ends:
            return self._end(whole[: min(ends)], "stop")
        if produced.finish:
            return self._end(whole.rstrip(INCOMPLETE), produced.finish)
        certain = len(whole) - max((_overlap(whole, stop) for stop in self.request.stop), default=0)
        if whole.endswith(INCOMPLETE) or certain < len(self.text):
            return ""
        piece, self.text = whole[len(self.text) : certain], whole[:certain]
        return piece

    def _decoded(self) -> str:
        """Return the text of all tokens: that of the earlier ones is known."""
        decode = self.tokenizer.decode
        whole = self._settled + decode(self.tokens[max(0, self._first - BEFORE) :])[self._known :]
        if len(self.tokens) - self._first > WINDOW and not whole.endswith(INCOMPLETE):
            self._settled, self._first = whole, len(self.tokens)
            self._known = len(decode(self.tokens[-BEFORE:]))
        return whole

    def _end(self, text: str, finish: Finish) -> str:
        piece, self.text, self.finish = text[len(self.text) :], text, finish
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, but not all of it, with which `text` ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def continue_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[TextRequest],
    *,
    context: int,
    max_batch: int = MAX_BATCH,
    engine: Callable[..., Generation] = Generation,
) -> Iterator[tuple[int, str, Continuation]]:
    """Yield (number of the request, text that was added, what it has by now) as texts grow, several at a time.

    Args:
        model: as `models.runner.Runner` takes it.
        context: number of most recent tokens that the model sees.
        engine: makes the `Generation`, with further options bound to it.
    """
    for_model = [each.for_model(tokenizer) for each in requests]
    n_blocks = blocks_needed(for_model, context=context, max_batch=max_batch)
    generation = engine(model, context=context, n_blocks=n_blocks, max_batch=max_batch)
    texts = {
        generation.add(tokens): (n, Continuation(request, tokenizer))
        for n, (tokens, request) in enumerate(zip(for_model, requests, strict=True))
    }
    while generation.is_busy:
        for produced in generation.step():
            n, text = texts[produced.request]
            if text.finish:
                continue  # a stop text came before a guess that was kept with it
            piece = text.take(produced)
            if text.finish and not produced.finish:
                generation.end(produced.request)
            yield n, piece, text
