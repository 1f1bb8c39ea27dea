"""Bits per byte that the default run reaches, beside a nanoGPT-like loop over a transformers model in the same time.

    python -m benchmarks.default_run --seeds 0 1 2 3 4 --out benchmarks/results/default_run.json

Each seed is one `megatrain train`, as `make train` starts it, in a directory of its own. The peer is what nanoGPT does
(github.com/karpathy/nanoGPT): GPT-2 from transformers, AdamW, linear warm-up and cosine decay to a tenth, gradients
clipped to 1, random windows of the token stream. It has the same tokens from the same tokenizer, the same held-out
tokens, and as many seconds as the median of our runs took, validations included in both; its schedule runs by the
clock, so that it ends when its time does. Several sizes, learning rates and batch
sizes are tried, and the best one counts.

Run it on an otherwise idle machine: what is reached depends on the seconds. Ours takes a fixed number of steps instead,
so on a slower machine it takes longer, and the peer gets that time too.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.machine import describe_machine
from megatrain.cli.compose import Source, compose
from megatrain.data.loader import Batch, validation_batches
from megatrain.data.prepare import Prepared, prepare
from megatrain.data.store import TokenStore
from megatrain.train.config import Config

CANDIDATES = (
    ((4, 128, 4), 1e-3, 12),
    ((4, 128, 4), 3e-3, 12),
    ((4, 192, 6), 1e-3, 12),
    ((2, 128, 4), 3e-3, 4),
    ((2, 96, 3), 3e-3, 4),
    ((2, 96, 3), 6e-3, 4),
    ((2, 96, 3), 1.2e-2, 4),
)
"""Layers, width and heads of the peer, its peak learning rate, and its sequences per step: nanoGPT's 12, and our 4."""
WARMUP = 0.05
"""Share of the time in which the peer's learning rate rises."""


@dataclass(frozen=True)
class Outcome:
    """What one run reached."""

    bits_per_byte: float
    untrained_bits_per_byte: float
    eval_loss: float
    """Nats a token."""
    steps: int
    seconds: float
    """From the first step's beginning to the last validation's end."""


def ours(seed: int, overrides: list[str]) -> Outcome:
    """Run the default config with `seed` as a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatrain", "train", f"run.dir={folder}", "run.name=default"]
        subprocess.run([*command, f"train.seed={seed}", *overrides], check=True)
        run = Path(folder) / "default"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        times = {
            event["event"]: datetime.fromisoformat(event["time"])
            for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        }
    validated = [row for row in rows if "eval/loss" in row]
    return Outcome(
        bits_per_byte=validated[-1]["eval/bits_per_byte"],
        untrained_bits_per_byte=validated[0]["eval/bits_per_byte"],
        eval_loss=validated[-1]["eval/loss"],
        steps=rows[-1]["step"],
        seconds=(times["stop"] - times["start"]).total_seconds(),
    )


def peer(
    cfg: Config,
    data: Prepared,
    candidate: tuple[tuple[int, int, int], float, int],
    *,
    seconds: float,
    seed: int,
) -> Outcome:
    """Train GPT-2 as `candidate` says for `seconds`."""
    size, rate, batch = candidate
    model = _gpt2(size, vocab_size=cfg.model.vocab_size, seq_len=cfg.seq_len, seed=seed)
    optimizer = torch.optim.AdamW(_groups(model), lr=rate, betas=(0.9, 0.99))
    assert isinstance(data.train, TokenStore)
    assert data.val is not None
    generator = np.random.default_rng(seed)
    held_out = list(
        validation_batches(
            data.val,
            seq_len=cfg.seq_len,
            tokens=cfg.train.eval_tokens,
            micro_batch_size=8,
            mask_documents=cfg.data.mask_documents,
        )
    )
    began = time.perf_counter()
    untrained, _ = _validate(model, held_out, data.token_bytes)
    validation_s = time.perf_counter() - began
    step = 0
    while (share := (time.perf_counter() - began) / (seconds - validation_s)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * _factor(share)
        starts = generator.integers(0, data.train.n_tokens - cfg.seq_len - 1, batch)
        tokens = torch.from_numpy(data.train.read(starts, cfg.seq_len).astype(np.int64))
        # transformers shifts the labels itself
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    bits, loss = _validate(model, held_out, data.token_bytes)
    return Outcome(bits, untrained, loss, step, time.perf_counter() - began)


def _gpt2(size: tuple[int, int, int], *, vocab_size: int, seq_len: int, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    layers, width, heads = size
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": seq_len}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **no_dropout))
    return model.train()


def _groups(model: nn.Module) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def _factor(share: float) -> float:
    """Return the learning rate as a share of its peak, after `share` of the time."""
    if share < WARMUP:
        return share / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def _validate(model: nn.Module, batches: list[Batch], token_bytes: np.ndarray) -> tuple[float, float]:
    """Return bits per byte and nats per token on `batches`; earlier documents of a row are seen, as in training."""
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        nats += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        )
        targets = batch.targets[batch.targets >= 0].numpy()
        tokens += targets.size
        size += int(token_bytes[targets].sum())
    return nats / (math.log(2) * size), nats / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of our runs")
    parser.add_argument("--no-peer", action="store_true", help="our runs only")
    parser.add_argument(
        "--peer-only", action="store_true", help="go on with the peer, after the runs that --out holds"
    )
    parser.add_argument("--peer-seconds", type=float, help="the peer's time; default: the median of ours")
    parser.add_argument("--out", type=Path, help="JSON file to write, anew after every run")
    parser.add_argument("overrides", nargs="*", help="of the default run's config")
    options = parser.parse_args()
    cfg = compose(options.overrides, Source())
    result: dict[str, object] = {
        "command": f"python -m benchmarks.default_run {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
    }
    mine, theirs = [], []
    if options.peer_only:
        before = json.loads(options.out.read_text())
        mine, theirs = before["ours"], before.get("peer", [])
    for seed in () if options.peer_only else options.seeds:
        mine.append({"seed": seed, **asdict(ours(seed, options.overrides))})
        _write(result | {"ours": mine}, options.out)
    seconds = options.peer_seconds or statistics.median(float(each["seconds"]) for each in mine)
    if not options.no_peer:
        tokenizer = replace(cfg.data.tokenizer, vocab_size=cfg.model.vocab_size)
        data = prepare(
            replace(cfg.data, tokenizer=tokenizer),
            progress=lambda name, share: None,
            vocab_size=cfg.model.vocab_size,
        )
        for candidate in CANDIDATES[len(theirs) :]:
            reached = peer(cfg, data, candidate, seconds=seconds, seed=0)
            size, rate, batch = candidate
            theirs.append({"layers_width_heads": size, "rate": rate, "batch": batch, **asdict(reached)})
            _write(result | {"ours": mine, "peer": theirs}, options.out)
    found = [float(each["bits_per_byte"]) for each in mine]
    result |= {"ours": mine, "ours_worst": max(found, default=None), "ours_best": min(found, default=None)}
    if theirs:
        best = min(float(each["bits_per_byte"]) for each in theirs)
        result |= {"peer": theirs, "peer_best": best}
        if found:
            result["fewer_bits_than_peer"] = round(1 - statistics.median(found) / best, 4)
    _write(result, options.out)


def _write(result: dict[str, object], out: Path | None) -> None:
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
