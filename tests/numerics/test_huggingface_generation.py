"""Generation equals transformers' on random small models, and its options equal transformers' logits processors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_huggingface_experts import MODELS as EXPERTS
from test_huggingface_parity import MODELS
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as processors

from megatrain.models.config import ModelConfig
from megatrain.models.generate import Generation, Request
from megatrain.models.registry import get_spec
from megatrain.models.sampling import Sampler, Sampling
from megatrain.models.speculate import LookUp

FAMILIES = {name: MODELS[name] for name in ("gpt2", "llama", "qwen3", "qwen3, window in some layers")}
FAMILIES |= {name: EXPERTS[name] for name in ("mixtral", "deepseek")}
PROMPTS = [[5, 3, 5, 3, 5, 3, 9], [2], [7, 7, 1, 4]]
TOKENS = 16


def pair(cfg: ModelConfig, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A random model, and the same one in transformers through the files that an export writes."""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if cfg.experts is None else torch.float32  # transformers' experts take no more
    model = get_spec(cfg.kind).build(cfg).to(dtype)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    tensors = get_spec(cfg.kind).weights(cfg).export(model.state_dict())
    whole = {key: value.contiguous() for key, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(get_spec(cfg.kind).hf_config(cfg)))
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in ("llama", "qwen3") else ()) for name in FAMILIES],
)
def test_greedy_text_is_transformers(family: str, tmp_path: Path) -> None:
    """Alone and in a batch, with the cache and without, guessing tokens and not."""
    model, reference = pair(FAMILIES[family], tmp_path)
    expected = []
    for prompt in PROMPTS:
        made = reference.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(made[0, len(prompt) :].tolist())
    ways: list[dict[str, Any]] = [{}, {"max_batch": 1}, {"uses_cache": False}, {"drafter": LookUp()}]
    for way in ways:
        generation = Generation(model, context=64, n_blocks=9, **way)
        for prompt in PROMPTS:
            how = Sampling(temperature=0)
            generation.add(Request(prompt=prompt, max_new_tokens=TOKENS, sampling=how))
        found: list[list[int]] = [[], [], []]
        while generation.is_busy:
            for each in generation.step():
                assert each.token is not None
                found[each.request].append(each.token)
        assert found == expected, way


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.3, "top_p": 0.5, "min_p": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_are_transformers(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    made = {
        "repetition_penalty": lambda x: processors.RepetitionPenaltyLogitsProcessor(x),
        "temperature": lambda x: processors.TemperatureLogitsWarper(x),
        "top_k": lambda x: processors.TopKLogitsWarper(x),
        "top_p": lambda x: processors.TopPLogitsWarper(x),
        "min_p": lambda x: processors.MinPLogitsWarper(x),
    }
    chain = [make(options[name]) for name, make in made.items() if name in options]
    for _ in range(20):
        logits = 3 * torch.randn(50, generator=generator, dtype=torch.float64)
        text = torch.randint(50, (12,), generator=generator)
        scores = logits.unsqueeze(0)
        for processor in chain:
            scores = processor(text.unsqueeze(0), scores)
        sampler = Sampler(Sampling(**{"temperature": 1.0} | options), text[:9].tolist())
        for token in text[9:11].tolist():
            sampler.see(token)
        found = sampler.probabilities(logits, text[11:].tolist())
        torch.testing.assert_close(found, scores.softmax(-1)[0], rtol=0, atol=1e-12)
