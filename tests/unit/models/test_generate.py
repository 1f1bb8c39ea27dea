"""Generation: batched over a paged cache as alone without one, repeatable, and drawn from the right distribution."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatrain.models.deepseek_v3.config import DeepseekV3Config
from megatrain.models.generate import Generation, Request, blocks_needed, generate
from megatrain.models.gpt2.config import GPT2Config
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import get_spec
from megatrain.models.sampling import Sampling
from megatrain.nn.config import DecoderConfig, ExpertsConfig, MLAConfig
from megatrain.nn.decoder import Decoder
from megatrain.nn.init import init_weights
from megatrain.nn.paged import OutOfBlocksError, PackedStep, PagedCache, Part

SIZES: dict[str, Any] = {
    "n_layers": 2, "hidden_size": 32, "n_heads": 4, "ffn_size": 48, "vocab_size": 61, "max_seq_len": 64,
    "init_std": 0.3,
}  # fmt: skip
EXPERTS = ExpertsConfig(n_experts=4, top_k=2, ffn_size=24)
MLA = MLAConfig(q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
FAMILIES: dict[str, Any] = {
    "gpt2": GPT2Config(**SIZES),
    "llama3": Llama3Config(**SIZES, n_kv_heads=2),
    "qwen3": Qwen3Config(
        **SIZES | {"n_layers": 4}, n_kv_heads=1, head_dim=12, sliding_window=7, full_attention_every=2
    ),
    "mixtral": MixtralConfig(**SIZES, n_kv_heads=2, experts=EXPERTS),
    "deepseek_v3": DeepseekV3Config(
        **SIZES, mla=MLA, experts=replace(EXPERTS, routing="sigmoid", bias_rate=0.0, n_shared_experts=1)
    ),
}
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [1], [9, 3, 2], [4, 4, 8], list(range(30, 50)), [6, 2]]


def build(cfg: DecoderConfig, seed: int = 1) -> Decoder:
    spec = get_spec(cfg.kind)  # type: ignore[attr-defined]
    model = spec.build(cfg).double()
    init_weights(model, spec.plan(cfg), seed=seed)
    return model


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(FAMILIES["llama3"])


def alone(model: nn.Module, request: Request, context: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of one prompt and their log-probabilities, from the whole text at each step."""
    tokens, logs = list(request.prompt), []
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            last = model(torch.tensor([tokens[-context:]]))[0, -1].log_softmax(-1)
        tokens.append(int(last.argmax()))
        logs.append(float(last.max()))
    return tokens[len(request.prompt) :], logs


def together(
    model: nn.Module, requests: list[Request], context: int, **options: Any
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of requests in one generation, at whose end no block is in use."""
    batch = options.get("max_batch", 8)
    n_blocks = blocks_needed(requests, context=context, max_batch=batch)
    generation = Generation(model, context=context, n_blocks=n_blocks, **options)
    places = {generation.add(request): n for n, request in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    logs: list[list[float]] = [[] for _ in requests]
    while generation.is_busy:
        for each in generation.step():
            if each.token is not None:
                tokens[places[each.request]].append(each.token)
                logs[places[each.request]].append(each.logprob or 0.0)
    assert generation.runner.cache.n_free == n_blocks
    return tokens, logs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_over_the_cache_is_each_alone_without_it(family: str) -> None:
    """Prompts of several lengths, more than run at a time, of which some outgrow what the model sees."""
    model = build(FAMILIES[family])
    requests = [
        Request(prompt=prompt, max_new_tokens=5 + 4 * n, sampling=GREEDY, logprobs=0)
        for n, prompt in enumerate(PROMPTS)
    ]
    tokens, logs = together(model, requests, 24, max_batch=4)
    for n, request in enumerate(requests):
        expected, expected_logs = alone(model, request, 24)
        assert tokens[n] == expected
        torch.testing.assert_close(logs[n], expected_logs, rtol=0, atol=1e-9)
    assert together(model, requests, 24, uses_cache=False)[0] == tokens


def test_requests_come_and_go(model: Decoder) -> None:
    """One that is added later, and one that is ended early, change nothing for the others."""
    first, second, third = (
        Request(prompt=prompt, max_new_tokens=9, sampling=Sampling(seed=n, temperature=1.0))
        for n, prompt in enumerate(PROMPTS[:3])
    )
    generation = Generation(model, context=64, n_blocks=6, max_batch=2)
    numbers = [generation.add(first), generation.add(second)]
    found: dict[int, list[int]] = {}
    for step in range(100):
        if step == 3:
            numbers.append(generation.add(third))
        if step == 5:
            generation.end(numbers[0])
        for each in generation.step():
            assert each.token is not None
            found.setdefault(each.request, []).append(each.token)
    assert not generation.is_busy
    assert len(found[numbers[0]]) == 5
    for number, request in zip(numbers[1:], (second, third), strict=True):
        assert found[number] == list(generate(model, request, context=64))


def test_a_cache_that_is_too_small(model: Decoder) -> None:
    generation = Generation(model, context=64, n_blocks=2, max_batch=2)
    with pytest.raises(ValueError, match="does not fit into the cache"):
        generation.add(Request(prompt=[1] * 30, max_new_tokens=3))
    with pytest.raises(ValueError, match="at least one token"):
        generation.add(Request(prompt=[], max_new_tokens=3))
    for _ in range(3):  # each takes all blocks, so they go one after the other
        generation.add(Request(prompt=[1] * 20, max_new_tokens=2))
    while generation.is_busy:
        assert len(generation.step()) == 1
    cache = PagedCache(2, block_size=4)
    with pytest.raises(OutOfBlocksError, match="2 free"):
        PackedStep(cache, [Part(0, 0, 9)], torch.device("cpu"))
    assert cache.n_free == 2


def test_nothing_is_wanted(model: Decoder) -> None:
    assert together(model, [Request(prompt=[1], max_new_tokens=0)], 8)[0] == [[]]


class Fixed(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: Tensor, *, positions: Tensor, keep: Tensor) -> Tensor:
        return self.logits.expand(1, len(keep), -1)


def test_repeats_under_a_seed_and_stops(model: Decoder) -> None:
    def text(seed: int, stop: frozenset[int] = frozenset()) -> list[int]:
        how = Sampling(seed=seed, top_k=5, temperature=0.8)
        request = Request(prompt=[1], max_new_tokens=9, sampling=how, stop=stop)
        return list(generate(model, request, context=8))

    first = text(3)
    assert first == text(3)
    assert first != text(4)
    assert text(3, frozenset({first[2]})) == first[: first.index(first[2])]


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
    "min_p": ({"min_p": 0.4}, [0, 0.5, 0, 0.25, 0]),
    "min_p of all": ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_from_the_distribution(name: str) -> None:
    options, weights = CASES[name]
    n = 500
    how = Sampling(**{"temperature": 1.0, "seed": 5} | options)
    tokens = list(generate(Fixed(BASE), Request(prompt=[0], max_new_tokens=n, sampling=how), context=1))
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = torch.tensor(weights) / sum(weights)
    assert (counts[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 5 * spread).all()  # five standard errors


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_what_was_in_the_cache_before_does_not_matter(family: str) -> None:
    """Memory that was never written, or that a text with NaN had before."""
    model = build(FAMILIES[family])
    requests = [Request(prompt=prompt, max_new_tokens=30, sampling=GREEDY, logprobs=1) for prompt in PROMPTS]
    expected = together(model, requests, 64)
    generation = Generation(model, context=64, n_blocks=30)
    generation.add(requests[0])
    generation.step()
    generation.end(0)
    for pair in generation.runner.cache._pools.values():
        for memory in pair:
            memory.fill_(float("nan"))
    numbers = {generation.add(request): n for n, request in enumerate(requests)}
    found: list[list[int]] = [[] for _ in requests]
    while generation.is_busy:
        for each in generation.step():
            assert each.token is not None
            found[numbers[each.request]].append(each.token)
    assert found == expected[0]
