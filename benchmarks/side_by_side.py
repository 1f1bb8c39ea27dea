"""Training speed beside a Hugging Face model of the same size in a plain PyTorch loop.

    python -m benchmarks.side_by_side --out benchmarks/results/cpu_side_by_side.json

Each contender trains the same shape on the same random tokens in the same packed documents: forward, backward,
clipping, AdamW. Rounds take turns, forwards and backwards (A B C, C B A, ...), so that a machine whose speed drifts
slows all alike; ratios are medians over rounds of the times in one round. The GEMM peak is measured in the same run,
with as many threads, and each contender's FLOP/s are given as a share of it. CPU time stands beside the time on the
clock: where other programs share the machine it is the one to compare.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.machine import describe_machine, gemm_peak
from benchmarks.synthetic import mean_document, random_batch
from megatrain.cli.compose import Source, compose
from megatrain.models.flops import flops_per_token
from megatrain.models.registry import get_spec
from megatrain.runtime.device import memory_bytes
from megatrain.train.auto import resolve_auto
from megatrain.train.build import build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

Step = Callable[[], None]

SMALL = [
    "data=synthetic",
    "data.mask_documents=true",
    "seq_len=256",
    "global_batch_size=8",
    "micro_batch_size=8",
]
SHAPES: dict[str, list[str]] = {
    "default": [],
    "gpt2": [
        "model=gpt2_124m", "model.n_layers=6", "model.hidden_size=256", "model.n_heads=4", "model.ffn_size=1024",
        "model.vocab_size=4096", *SMALL,
    ],
    "llama3": [
        "model=llama3_debug", "model.n_layers=6", "model.hidden_size=256", "model.n_heads=4", "model.n_kv_heads=2",
        "model.ffn_size=704", "model.vocab_size=4096", *SMALL,
    ],
}  # fmt: skip
"""Name -> overrides: the default run as it is, and presets made so small that a CPU trains them."""
CONTENDERS = {
    "fp32": ("ours_fp32", "hf_fp32"),
    "bf16": ("ours_bf16", "hf_bf16_autocast"),
}
"""Precision -> who is compared in it."""


def ours(cfg: Config, precision: str) -> Step:
    """Return our training step, as `megatrain train` runs it."""
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
    state = build_state(cfg, torch.device("cpu"))
    batch = random_batch(cfg, seed=0, packed="short")
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
    batch = random_batch(cfg, seed=0, packed="short")
    causal = torch.ones(cfg.seq_len, cfg.seq_len, dtype=torch.bool).tril()
    masks = []  # made ahead: not timed
    for part in batch.micro_batches:
        assert part.doc_ids is not None
        masks.append((part.doc_ids[:, :, None] == part.doc_ids[:, None, :])[:, None] & causal)

    def step() -> None:
        for part, mask in zip(batch.micro_batches, masks, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits = model(
                    input_ids=part.tokens, position_ids=part.positions, attention_mask=mask, use_cache=False
                ).logits
            loss = cross_entropy(logits.float().flatten(0, 1), part.targets.flatten(), reduction="sum")
            (loss / batch.valid_tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def void(_: object) -> None:
    """Drop a step's result."""


def measure(
    contenders: dict[str, Step], *, rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time each contender in turn: seconds a step and CPU seconds a step, one figure of each a round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
        step()
    for number in range(rounds):
        for name, step in list(contenders.items())[:: 1 - 2 * (number % 2)]:
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            times[name].append((time.perf_counter() - started) / steps)
            cpu_times[name].append((time.process_time() - cpu_started) / steps)
    return times, cpu_times


def compare(
    name: str, overrides: list[str], precisions: list[str], *, rounds: int, steps: int
) -> dict[str, object]:
    """Compare the contenders at one shape: tokens/s, FLOP/s and their share of the peak, and ratios with spreads."""
    cfg = resolve_auto(compose(overrides, Source()), memory=memory_bytes(torch.device("cpu")))
    print(f"{name}: {cfg.model.n_layers} layers, hidden {cfg.model.hidden_size}", flush=True)
    flops = flops_per_token(cfg.model, cfg.seq_len, causal=True)
    tokens = cfg.global_batch_size * cfg.seq_len
    packed = mean_document(random_batch(cfg, seed=0, packed="short"))
    found: dict[str, object] = {"overrides": overrides, "tokens_per_step": tokens, "mean_document": packed}
    for precision in precisions:
        us, them = CONTENDERS[precision]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peak, cpu_peak = gemm_peak(dtype), gemm_peak(dtype, time.process_time)
        contenders = {us: ours(cfg, precision), them: hugging_face(cfg, autocast=precision == "bf16")}
        times, cpu_times = measure(contenders, rounds=rounds, steps=steps)
        speed = {who: tokens / statistics.median(values) for who, values in times.items()}
        found[precision] = {
            "gemm_peak_gflops": round(peak / 1e9, 1),
            "tokens_per_sec": {who: round(value) for who, value in speed.items()},
            "share_of_gemm_peak": {who: round(value * flops / peak, 3) for who, value in speed.items()},
            "share_of_gemm_peak_by_cpu_time": {
                who: round(tokens * flops / statistics.median(values) / cpu_peak, 3)
                for who, values in cpu_times.items()
            },
            "ratio": _ratio(times[us], times[them]),
            "ratio_of_cpu_time": _ratio(cpu_times[us], cpu_times[them]),
            "seconds_per_step": {who: [round(v, 5) for v in values] for who, values in times.items()},
            "cpu_seconds_per_step": {who: [round(v, 5) for v in values] for who, values in cpu_times.items()},
        }
        print(f"  {precision}: {json.dumps(found[precision])}", flush=True)
    return found


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return median and quartiles over rounds of our speed over theirs."""
    low, middle, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    options = parser.parse_args()
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.side_by_side " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "conventions": {
            "flops": "forward and backward of matrix products, attention as a causal mask without documents leaves it",
            "ratio": "our tokens/s over theirs, median and quartiles over rounds; of CPU time: theirs over ours",
        },
    }
    result["shapes"] = {
        name: compare(name, SHAPES[name], options.precisions, rounds=options.rounds, steps=options.steps)
        for name in options.shapes
    }
    result["load_average_at_the_end"] = os.getloadavg()[0]
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
