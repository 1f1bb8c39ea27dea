"""Generation: greedy, repeatable, and drawn from the right distribution."""

from typing import Any

import pytest
import torch
from torch import nn

from megatrain.models.generate import generate
from megatrain.nn.config import DecoderConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.plan import decoder_plan

CFG = DecoderConfig(n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, vocab_size=61, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(CFG).double()
    init_weights(model, decoder_plan(CFG), seed=1)
    return model


class Fixed(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_greedy_takes_the_likeliest_token_of_a_sliding_context(model: Decoder) -> None:
    prompt = [3, 14, 15, 9]
    produced = list(generate(model, prompt, max_new_tokens=8, context=6, temperature=0))
    assert len(produced) == 8
    for step, token in enumerate(produced):
        seen = (prompt + produced)[: 4 + step][-6:]
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())


def test_repeats_under_a_seed_and_stops(model: Decoder) -> None:
    first = list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5))
    assert first == list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5))
    assert first != list(generate(model, [1], max_new_tokens=9, context=8, seed=4, top_k=5))
    stopped = list(generate(model, [1], max_new_tokens=9, context=8, seed=3, top_k=5, stop=first[2]))
    assert stopped == first[: first.index(first[2])]


BASE = [0.1, 0.5, 0.0, 0.25, 0.15]
CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "as it is": ({}, BASE),
    "cold": ({"temperature": 0.5}, [0.01, 0.25, 0.0, 0.0625, 0.0225]),
    "top_k": ({"top_k": 2}, [0, 0.5, 0, 0.25, 0]),
    "top_k of all": ({"top_k": 9}, BASE),
    "top_p": ({"top_p": 0.7}, [0, 0.5, 0, 0.25, 0]),
    "top_p at an edge": ({"top_p": 0.8}, [0, 0.5, 0, 0.25, 0.15]),
    "top_p of nothing": ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
    "top_k and top_p": ({"top_k": 3, "top_p": 0.6}, [0, 0.5, 0, 0.25, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_from_the_distribution(name: str) -> None:
    options, weights = CASES[name]
    n = 2000
    draw = {"temperature": 1.0} | options
    tokens = list(generate(Fixed(BASE), [0], max_new_tokens=n, context=1, seed=5, **draw))
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = torch.tensor(weights) / sum(weights)
    assert (counts[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 5 * spread).all()  # five standard errors
