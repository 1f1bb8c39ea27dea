"""Speculative decoding: the same greedy text, and exactly the same distribution of sampled text."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unit.models.test_generate import FAMILIES, GREEDY, PROMPTS, build, together

from megatrain.models.generate import Generation, Request
from megatrain.models.sampling import Sampler, Sampling
from megatrain.models.speculate import Drafter, DraftModel, LookUp
from megatrain.nn.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(FAMILIES["qwen3"])


def draft_model(seed: int, context: int = 40) -> DraftModel:
    """The model itself under seed 1, and under others one that agrees with it by chance only."""
    return DraftModel(build(FAMILIES["qwen3"], seed), context=context, n_blocks=99)


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "look-up": LookUp,
    "the model itself": lambda: draft_model(1),
    "another model": lambda: draft_model(2),
    "another model, which sees less": lambda: draft_model(2, context=12),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name.endswith("model") else ()) for name in DRAFTERS],
)
def test_greedy_text_is_the_same(model: Decoder, name: str) -> None:
    """In a batch, up to the end of the context and beyond, with stop tokens among the guesses."""
    requests = [Request(prompt=prompt, max_new_tokens=20, sampling=GREEDY) for prompt in PROMPTS]
    plain, _ = together(model, requests, 24)
    requests[2] = Request(
        prompt=PROMPTS[2], max_new_tokens=20, sampling=GREEDY, stop=frozenset(plain[2][7:8])
    )
    plain, _ = together(model, requests, 24)
    drafter = DRAFTERS[name]()
    assert together(model, requests, 24, drafter=drafter, draft_tokens=3)[0] == plain
    if isinstance(drafter, DraftModel):
        assert drafter.runner.cache.n_free == drafter.runner.cache.n_blocks


def passes(model: nn.Module, request: Request, drafter: Drafter | None) -> int:
    generation = Generation(model, context=64, n_blocks=9, drafter=drafter, draft_tokens=3)
    generation.add(request)
    while generation.is_busy:
        generation.step()
    return generation.passes


def test_good_guesses_save_passes(model: Decoder) -> None:
    request = Request(prompt=PROMPTS[0], max_new_tokens=21, sampling=GREEDY)
    assert passes(model, request, None) == 21
    assert passes(model, request, draft_model(1, context=64)) == 1 + 5  # one token, then four at a time


class Markov(nn.Module):
    """A model whose next token depends on the last one: `(vocab, vocab)` probabilities."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float64).log())

    def forward(self, tokens: Tensor, *, positions: Tensor, keep: Tensor) -> Tensor:
        return self.table[tokens[:, keep]]


TARGET = Markov([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8], [0.4, 0.0, 0.6]])
GUESSER = Markov([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
LENGTH = 4


class Enumerated:
    """Takes the place of random draws: `paths` goes through all that could be drawn, each with its probability."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.taken: list[tuple[int, Tensor]] = []

    def draw(self, weights: Tensor) -> int:
        legal = weights.nonzero().flatten().tolist()
        place = len(self.taken)
        choice = self.script[place] if place < len(self.script) else 0
        self.taken.append((choice, (weights / weights.sum()).double()[legal]))
        return int(legal[choice])

    def outcomes(self, run: Callable[[], Any]) -> dict[Any, float]:
        """Return the probability of each result of `run`."""
        found: dict[Any, float] = {}
        while True:
            self.taken = []
            result = run()
            probability = 1.0
            for choice, weights in self.taken:
                probability *= float(weights[choice])
            found[result] = found.get(result, 0.0) + probability
            while self.taken and self.taken[-1][0] == len(self.taken[-1][1]) - 1:
                self.taken.pop()
            if not self.taken:
                return found
            self.script = [choice for choice, _ in self.taken]
            self.script[-1] += 1


def distribution(
    monkeypatch: pytest.MonkeyPatch, how: Sampling, prompt: list[int], drafter: Callable[[], Drafter | None]
) -> dict[tuple[int, ...], float]:
    every = Enumerated()
    monkeypatch.setattr(Sampler, "draw", lambda _, weights: every.draw(weights))

    def text() -> tuple[int, ...]:
        request = Request(prompt=prompt, max_new_tokens=LENGTH, sampling=how)
        generation = Generation(TARGET, context=64, n_blocks=2, drafter=drafter(), draft_tokens=2)
        generation.add(request)
        found: list[int] = []
        while generation.is_busy:
            found += [each.token for each in generation.step() if each.token is not None]
        return tuple(found)

    return every.outcomes(text)


PLAIN = Sampling(temperature=1.0)
OPTIONS = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.5)


def guesser() -> DraftModel:
    return DraftModel(GUESSER, context=64, n_blocks=2)


@pytest.mark.parametrize(
    ("drafter", "how"),
    [
        (LookUp, OPTIONS),
        (guesser, PLAIN),
        pytest.param(LookUp, PLAIN, marks=pytest.mark.slow),
        pytest.param(guesser, OPTIONS, marks=pytest.mark.slow),
    ],
    ids=["look-up, options", "draft model", "look-up", "draft model, options"],
)
def test_sampled_text_has_the_same_distribution(
    monkeypatch: pytest.MonkeyPatch, drafter: Callable[[], Drafter], how: Sampling
) -> None:
    prompt = [2, 0, 1, 2, 0]
    found = distribution(monkeypatch, how, prompt, drafter)
    truth = distribution(monkeypatch, how, prompt, lambda: None)
    if how == PLAIN:
        table = TARGET.table.detach().exp()
        for text in product(range(3), repeat=LENGTH):
            steps = zip((prompt[-1], *text), text, strict=False)
            expected = float(torch.stack([table[a, b] for a, b in steps]).prod())
            assert truth.get(text, 0.0) == pytest.approx(expected, abs=1e-12)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    for text in found.keys() | truth.keys():
        assert found.get(text, 0.0) == pytest.approx(truth.get(text, 0.0), abs=1e-9), text
