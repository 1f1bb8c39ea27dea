"""Training speed beside a Hugging Face model of the same size in a plain PyTorch loop.

    python -m benchmarks.side_by_side --out benchmarks/results/cpu_side_by_side.json

Each contender trains the same shape on the same random tokens: forward, backward, clipping, AdamW. Rounds are
interleaved (A B C A B C ...), so that a machine whose speed drifts slows all alike; medians are compared. The
GEMM peak is measured in the same run.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import describe_machine, gemm_peak
from benchmarks.synthetic import random_batch
from megatrain.cli.compose import Source, compose
from megatrain.models.flops import flops_per_token
from megatrain.models.registry import get_spec
from megatrain.train.build import build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

Step = Callable[[], None]

SMALL = ["model.vocab_size=4096", "seq_len=256", "global_batch_size=16", "micro_batch_size=16"]
WIDTH = ["model.n_layers=6", "model.hidden_size=384", "model.n_heads=6"]
SHAPES: dict[str, list[str]] = {
    "default": [],
    "gpt2_10m": ["model=gpt2_124m", "model.ffn_size=1536", *WIDTH, *SMALL],
    "llama_10m": [
        "model=llama3_debug",
        "model.n_kv_heads=2",
        "model.ffn_size=1024",
        "model.tie_embeddings=true",
        *WIDTH,
        *SMALL,
    ],
}


def ours(cfg: Config, precision: str) -> Step:
    """Return our training step, as `megatrain train` runs it."""
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
    state = build_state(cfg, torch.device("cpu"))
    batch = random_batch(cfg, seed=0)
    return lambda: void(train_step(state, batch, cfg, lr=1e-4))


def hugging_face(cfg: Config, *, autocast: bool) -> Step:
    """Return a step of the plain loop around transformers' model of the same config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = dict(get_spec(cfg.model.kind).hf_config(cfg.model))
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    batch = random_batch(cfg, seed=0)

    def step() -> None:
        for part in batch.micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                # transformers shifts the labels itself
                loss = model(input_ids=part.tokens, labels=part.tokens, use_cache=False).loss
            (loss / len(batch.micro_batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def void(_: object) -> None:
    """Drop a step's result."""


def measure(contenders: dict[str, Step], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Time each contender in turn: seconds a step, one figure a round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
        step()
    for number in range(rounds):
        for name, step in contenders.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - started) / steps)
        print(f"  round {number + 1}/{rounds}", flush=True)
    return times


def compare(name: str, overrides: list[str], *, rounds: int, steps: int) -> dict[str, object]:
    """Compare all contenders at one shape: tokens/s, FLOP/s, and the ratios that count."""
    cfg = compose(overrides, Source())
    contenders = {
        "ours_fp32": ours(cfg, "fp32"),
        "ours_bf16": ours(cfg, "bf16"),
        "hf_fp32": hugging_face(cfg, autocast=False),
        "hf_bf16_autocast": hugging_face(cfg, autocast=True),
    }
    print(f"{name}: {cfg.model.n_layers} layers, hidden {cfg.model.hidden_size}", flush=True)
    times = measure(contenders, rounds=rounds, steps=steps)
    tokens = cfg.global_batch_size * cfg.seq_len
    speed = {key: tokens / statistics.median(values) for key, values in times.items()}
    flops = flops_per_token(cfg.model, cfg.seq_len, causal=True)

    def paired(a: str, b: str) -> float:
        """Return the median over rounds of a's speed over b's in the same round."""
        return statistics.median(y / x for x, y in zip(times[a], times[b], strict=True))

    return {
        "overrides": overrides,
        "tokens_per_sec": {key: round(value) for key, value in speed.items()},
        "gflops_causal": {key: round(value * flops / 1e9, 1) for key, value in speed.items()},
        "ratio": {
            "fp32 to Hugging Face fp32": round(paired("ours_fp32", "hf_fp32"), 3),
            "bf16 to Hugging Face bf16 autocast": round(paired("ours_bf16", "hf_bf16_autocast"), 3),
            "bf16 (default) to Hugging Face fp32": round(paired("ours_bf16", "hf_fp32"), 3),
        },
        "seconds_per_step": {key: [round(v, 5) for v in values] for key, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    options = parser.parse_args()
    result: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
    result["gemm_peak_gflops"] = {
        "fp32": round(gemm_peak(torch.float32) / 1e9),
        "bf16": round(gemm_peak(torch.bfloat16) / 1e9),
    }
    result["shapes"] = {
        name: compare(name, SHAPES[name], rounds=options.rounds, steps=options.steps)
        for name in options.shapes
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
