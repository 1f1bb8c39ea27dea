"""Autoregressive generation of several sequences at a time, each of which may begin and end when it likes."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from megatrain.models.runner import Runner, Running, Work
from megatrain.models.sampling import Sampler, Sampling, log_probabilities
from megatrain.models.speculate import Draft, Drafter, verified
from megatrain.nn.paged import PagedCache

MAX_BATCH = 8
"""Sequences that are generated together, unless said otherwise."""
PROMPT_TOKENS = 4096
"""Tokens of prompts that enter one pass, unless a single prompt is longer: a pass of many makes the others wait."""
DRAFT_TOKENS = 4
"""Tokens that are guessed at a time in speculative decoding, unless said otherwise."""
NO_DRAFT = Draft([], [])
Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how it is to be continued."""

    prompt: Sequence[int]
    """At least one token."""
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    """Tokens that end the text and are not part of it."""
    logprobs: int | None = None
    """Number of likeliest tokens whose log-probabilities are wanted at each place, beside the chosen one's; None: not
    even that."""


class Produced(NamedTuple):
    """One token of a request, or its end."""

    request: int
    token: int | None
    """None: the text ends without another one."""
    finish: Finish
    """Why the request ends with this; empty if it does not."""
    logprob: float | None = None
    """Log-probability of the token under the model, whatever the options of sampling."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, the best first."""


def blocks_needed(requests: Sequence[Request], *, context: int, max_batch: int = MAX_BATCH) -> int:
    """Return how many blocks of a cache are enough for `max_batch` of the requests at a time."""
    cache = PagedCache(0)
    needs = sorted((cache.blocks_for(_longest(each, context)) for each in requests), reverse=True)
    return max(1, sum(needs[:max_batch]))


def _longest(request: Request, context: int) -> int:
    return min(len(request.prompt) + request.max_new_tokens, context)


@dataclass
class _Member:
    """A request that is being generated."""

    request: Request
    running: Running
    blocks: int
    """That it may need in the end."""
    left: int
    """Number of tokens that may still come."""


class Generation:
    """Continuous batching: `step` gives every running request its next token, and lets waiting ones in.

    A text does not depend on the others in the batch, but for the rounding of products over more or fewer tokens.
    A model sees its `context` most recent tokens. While a text is no longer than that, its keys and values are cached;
    beyond, every position changes with every token, and each pass reads them all anew.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int,
        n_blocks: int,
        max_batch: int = MAX_BATCH,
        drafter: Drafter | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        uses_cache: bool = True,
    ) -> None:
        """Take the model (see `Runner`), and how large the batch and its cache may become."""
        self.runner = Runner(model, PagedCache(n_blocks))
        self.context = context
        self.max_batch = max_batch
        self.drafter = drafter
        self.draft_tokens = draft_tokens
        self.uses_cache = uses_cache
        self.passes = 0
        """Passes of the model so far."""
        self._waiting: deque[tuple[int, Request]] = deque()
        self._members: dict[int, _Member] = {}
        self._next = 0
        self._reserved = 0
        """Blocks that the running requests may need in the end."""

    @property
    def is_busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._members or self._waiting)

    @property
    def n_running(self) -> int:
        """Number of requests that run."""
        return len(self._members)

    @property
    def n_waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; returns its number.

        Raises:
            ValueError: it has no prompt, or the cache is too small for it alone.
        """
        if not request.prompt:
            raise ValueError("a prompt must have at least one token")
        if self._need(request) > self.runner.cache.n_blocks:
            raise ValueError(
                f"a text of {_longest(request, self.context)} tokens does not fit into the cache "
                f"({self.runner.cache.n_blocks} blocks of {self.runner.cache.block_size} tokens)"
            )
        self._waiting.append((self._next, request))
        self._next += 1
        return self._next - 1

    def end(self, number: int) -> None:
        """End a request early, if it has not ended; others take its place."""
        member = self._members.pop(number, None)
        if member is not None:
            self._reserved -= member.blocks
            self.runner.cache.release(number)
            if self.drafter is not None:
                self.drafter.forget(number)
        else:
            self._waiting = deque(each for each in self._waiting if each[0] != number)

    def step(self) -> list[Produced]:
        """Pass the new tokens of all running requests through the model; returns what that produced, in order."""
        found = self._admit()
        members = list(self._members.values())
        if not members:
            return found
        drafts = self._drafts(members)
        works = [self._work(each.running, draft) for each, draft in zip(members, drafts, strict=True)]
        logits, rows = self.runner.run(works)
        self.passes += 1
        greedy = all(each.running.sampler.is_greedy and each.request.logprobs is None for each in members)
        best: list[int] = logits.argmax(-1).tolist() if greedy else []
        host = None if greedy else logits.cpu()
        for member, draft, row in zip(members, drafts, rows, strict=True):
            if host is None:
                chosen = _agreed(draft.tokens, best[row]) if draft.tokens else best[row]
                found += self._take(member, chosen, None)
            else:
                found += self._take(member, _chosen(member, draft, host[row]), host[row])
        return found

    def _need(self, request: Request) -> int:
        return self.runner.cache.blocks_for(_longest(request, self.context))

    def _admit(self) -> list[Produced]:
        """Let waiting requests in, in order, as far as their longest texts fit; returns those that want no token."""
        ended: list[Produced] = []
        tokens = 0
        while self._waiting and len(self._members) < self.max_batch:
            number, request = self._waiting[0]
            tokens += len(request.prompt)
            blocks = self._need(request)
            is_first = tokens == len(request.prompt)
            if self._reserved + blocks > self.runner.cache.n_blocks or (
                tokens > PROMPT_TOKENS and not is_first
            ):
                break
            self._waiting.popleft()
            if request.max_new_tokens == 0:
                ended.append(Produced(number, None, "length"))
                continue
            sampler = Sampler(request.sampling, request.prompt)
            running = Running(number, list(request.prompt), sampler)
            self._members[number] = _Member(request, running, blocks, request.max_new_tokens)
            self._reserved += blocks
        return ended

    def _drafts(self, members: list[_Member]) -> list[Draft]:
        if self.drafter is None:
            return [NO_DRAFT] * len(members)
        counts = [self._guesses(each) for each in members]
        asked = [n for n, count in enumerate(counts) if count > 0]
        made = self.drafter.draft([members[n].running for n in asked], [counts[n] for n in asked])
        drafts = [NO_DRAFT] * len(members)
        for n, draft in zip(asked, made, strict=True):
            drafts[n] = draft
        return drafts

    def _guesses(self, member: _Member) -> int:
        """Return how many tokens are to be guessed: no more than can be used, and none beyond the context."""
        running = member.running
        if not running.cached:
            return 0
        return min(self.draft_tokens, member.left - 1, self.context - len(running.tokens))

    def _work(self, running: Running, draft: Draft) -> Work:
        if len(running.tokens) > self.context or not self.uses_cache:
            self.runner.cache.release(running.number)
            return Work(
                running.number, 0, running.tokens[-self.context :] + draft.tokens, 1 + len(draft.tokens)
            )
        new = running.tokens[running.cached :] + draft.tokens
        return Work(running.number, running.cached, new, 1 + len(draft.tokens))

    def _take(self, member: _Member, chosen: list[int], logits: Tensor | None) -> list[Produced]:
        """Append the chosen tokens to a text, until it ends."""
        request, running = member.request, member.running
        found: list[Produced] = []
        for n, token in enumerate(chosen):
            if token in request.stop:
                found.append(Produced(running.number, None, "stop"))
                break
            running.tokens.append(token)
            running.sampler.see(token)
            member.left -= 1
            finish: Finish = "" if member.left else "length"
            if logits is None or request.logprobs is None:
                found.append(Produced(running.number, token, finish))
            else:
                found.append(
                    Produced(running.number, token, finish, *_facts(logits[n], token, request.logprobs))
                )
            if finish:
                break
        running.cached = len(running.tokens) - 1
        if found[-1].finish:
            self.end(running.number)
        return found


def _agreed(guesses: list[int], best: list[int]) -> list[int]:
    """Return the guesses that are the likeliest tokens, and the likeliest one after them."""
    n = next((n for n, guess in enumerate(guesses) if guess != best[n]), len(guesses))
    return best[: n + 1]


def _chosen(member: _Member, draft: Draft, logits: Tensor) -> list[int]:
    sampler = member.running.sampler

    def probabilities(n: int) -> Tensor:
        return sampler.probabilities(logits[n], draft.tokens[:n])

    return verified(draft, probabilities, sampler.draw)


def _facts(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and the `count` likeliest tokens with theirs."""
    logs = log_probabilities(logits)
    best = logs.topk(min(count, logs.numel()))
    return float(logs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def generate(model: nn.Module, request: Request, *, context: int) -> Iterator[int]:
    """Yield the token ids that follow one prompt; see `Generation`."""
    generation = Generation(
        model, context=context, n_blocks=blocks_needed([request], context=context), max_batch=1
    )
    generation.add(request)
    while generation.is_busy:
        yield from (each.token for each in generation.step() if each.token is not None)
