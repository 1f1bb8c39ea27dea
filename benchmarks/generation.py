"""Speed of generation with and without the paged cache, beside transformers' `generate` on the same weights.

    python -m benchmarks.generation --out benchmarks/results/generation_cpu.json

Each contender continues the same random prompts greedily, in float32, in one process: one, and eight at a time. The
contenders take turns, so that a machine whose speed drifts slows all alike; ratios are medians over rounds. CPU time
stands beside the time on the clock: where other programs share the machine it is the one to compare. That the texts
are equal is checked.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import describe_machine
from megatrain.models.config import ModelConfig
from megatrain.models.generate import Generation, Request, blocks_needed
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.models.registry import get_spec
from megatrain.models.sampling import Sampling
from megatrain.nn.init import init_weights

Texts = list[list[int]]
Contender = Callable[[], Texts]
SHAPES: dict[str, ModelConfig] = {
    "default": Qwen3Config(n_layers=4, hidden_size=128, n_heads=4, head_dim=32, ffn_size=512, vocab_size=2048),
    "llama3_42m": Llama3Config(
        n_layers=8, hidden_size=512, n_heads=8, n_kv_heads=4, ffn_size=1536, vocab_size=16384
    ),
}  # fmt: skip
GREEDY = Sampling(temperature=0.0)


def ours(model: nn.Module, prompts: Texts, tokens: int, *, uses_cache: bool) -> Contender:
    """Return what continues the prompts as `megatrain generate` does."""
    requests = [Request(prompt=prompt, max_new_tokens=tokens, sampling=GREEDY) for prompt in prompts]
    context = len(prompts[0]) + tokens

    def run() -> Texts:
        generation = Generation(
            model,
            context=context,
            n_blocks=blocks_needed(requests, context=context),
            uses_cache=uses_cache,
        )
        numbers = [generation.add(request) for request in requests]
        found: dict[int, list[int]] = {number: [] for number in numbers}
        while generation.is_busy:
            for each in generation.step():
                if each.token is not None:
                    found[each.request].append(each.token)
        return list(found.values())

    return run


def hugging_face(model: nn.Module, cfg: ModelConfig, prompts: Texts, tokens: int) -> Contender:
    """Return transformers' `generate` on the same weights, with its own cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = get_spec(cfg.kind)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.hf_config(cfg)))
    weights = spec.weights(cfg).export(dict(model.named_parameters()))
    missing = theirs.load_state_dict(dict(weights), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    theirs.tie_weights()
    theirs.eval()
    inputs = torch.tensor(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens}

    def run() -> Texts:
        made = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return [row[inputs.shape[1] :].tolist() for row in made]

    return run


def compare(cfg: ModelConfig, batch: int, *, prompt: int, tokens: int, rounds: int) -> dict[str, object]:
    """Compare the contenders on `batch` prompts of `prompt` tokens, each continued by `tokens`."""
    spec = get_spec(cfg.kind)
    model = spec.build(cfg)
    init_weights(model, spec.plan(cfg), seed=0)
    prompts = torch.randint(
        cfg.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1)
    ).tolist()
    contenders = {
        "paged_cache": ours(model, prompts, tokens, uses_cache=True),
        "no_cache": ours(model, prompts, tokens, uses_cache=False),
        "transformers": hugging_face(model, cfg, prompts, tokens),
    }
    texts = {name: run() for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in list(contenders.items())[:: 1 - 2 * (number % 2)]:
            began, cpu_began = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)
    made = batch * tokens
    return {
        "tokens_per_sec": {name: round(made / statistics.median(each)) for name, each in seconds.items()},
        "tokens_per_cpu_sec": {
            name: round(made / statistics.median(each)) for name, each in cpu_seconds.items()
        },
        "ratio_to_transformers": _ratios(seconds),
        "ratio_of_cpu_time_to_transformers": _ratios(cpu_seconds),
        "equal_texts": {
            name: sum(map(lists_equal, each, texts["transformers"])) for name, each in texts.items()
        },
        "seconds": {name: [round(value, 4) for value in each] for name, each in seconds.items()},
        "cpu_seconds": {name: [round(value, 4) for value in each] for name, each in cpu_seconds.items()},
    }


def lists_equal(a: list[int], b: list[int]) -> bool:
    """Tell whether two texts are equal."""
    return a == b


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return each one's speed over transformers', the median over rounds."""
    theirs = seconds["transformers"]
    return {
        name: round(statistics.median([b / a for a, b in zip(each, theirs, strict=True)]), 2)
        for name, each in seconds.items()
        if name != "transformers"
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.generation " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "load_average_at_the_start": os.getloadavg()[0],
        "conventions": "greedy, float32, prefill included; a ratio above 1 is faster than transformers",
        "prompt_tokens": options.prompt,
        "new_tokens": options.tokens,
    }
    for shape in options.shapes:
        found: dict[str, object] = {}
        result[shape] = found
        for batch in options.batches:
            found[f"batch_{batch}"] = compare(
                SHAPES[shape], batch, prompt=options.prompt, tokens=options.tokens, rounds=options.rounds
            )
            print(shape, batch, json.dumps(found[f"batch_{batch}"]), flush=True)
            result["load_average_at_the_end"] = os.getloadavg()[0]
            if options.out:  # what is measured is kept, whatever comes
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
