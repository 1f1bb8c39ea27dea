"""What each method of `megatrain compress` costs and saves, on trained runs.

    python -m benchmarks.compression runs/default --out benchmarks/results/compression.json

Every method compresses the same weights of a run, is calibrated on one part of the text that the run has held out, and
measured on the other part. Sizes are those of the written files beside those of the same model in 16 bits. Speeds are
of this machine under this load, in float32 unless said otherwise.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from megatrain.compress.methods import METHODS, Quantization, Sparsity
from megatrain.compress.report import facts_of, int8_speed, on_disk, on_held_out, sizes, zeros
from megatrain.compress.run import compress, make_plan
from megatrain.compress.text import SAMPLES, held_out
from megatrain.compress.write_hf import write_hf
from megatrain.models.config import ModelConfig
from megatrain.runtime.processes import Processes
from megatrain.train.inference import load_trained

GROUPS = (32, 128)
Options = dict[str, Any]


def cases(model: ModelConfig, methods: list[str]) -> list[tuple[str, Options]]:
    """Return `methods` with their options: all groups that the layers can have, two sparsities, two prunings."""
    inputs = {model.hidden_size, model.ffn_size, model.n_heads * model.qk_head_dim}
    fewer = {"heads": model.n_heads - model.n_heads // model.kv_heads, "ffn": model.ffn_size * 3 // 4}
    found: list[tuple[str, Options]] = []
    for name in methods:
        method = METHODS[name]
        if isinstance(method, Quantization) and method.is_grouped:
            found += [(name, {"group": n}) for n in GROUPS if all(size % n == 0 for size in inputs)]
        elif isinstance(method, Sparsity) and not method.is_two_of_four:
            found += [(name, {"sparsity": share}) for share in (0.3, 0.5)]
        elif name == "prune":
            found += [(name, {"ffn": fewer["ffn"]}), (name, fewer)]
        else:
            found.append((name, {}))
    return found


def silent(phase: str, share: float) -> None:
    """Show no progress."""


def measure(run: Path, methods: list[str], tokens: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand the table of a run to `keep` after each of its rows."""
    trained = load_trained(run, Processes())
    text = held_out(trained, samples=SAMPLES, progress=silent)
    assert text is not None
    text = replace(text, measured=text.measured[: -(-tokens // text.measured[0].tokens.numel())])
    before = facts_of(trained, on_held_out(text))
    table: dict[str, Any] = {"step": trained.step, **before, "methods": []}
    for name, options in cases(trained.cfg.model, methods):
        method, model = METHODS[name], load_trained(run, Processes())
        plan = make_plan(model.cfg.model, method, **options)
        began = time.perf_counter()
        done = compress(model, plan, text.calibration if method.needs_text else [], silent)
        row: dict[str, Any] = {"method": name, **options, "seconds": round(time.perf_counter() - began, 1)}
        with tempfile.TemporaryDirectory() as folder:
            quantization = method if isinstance(method, Quantization) else None
            write_hf(Path(folder), done.trained, done.codes, quantization, "fp16")
            row["bytes"] = sizes(done, plan, before["parameters"]) | {"on_disk": on_disk(Path(folder))}
        row |= facts_of(done.trained, on_held_out(text))
        row["perplexity_change_percent"] = round(
            100 * (row["text"]["perplexity"] / before["text"]["perplexity"] - 1), 3
        )
        if isinstance(method, Sparsity):
            row["zeros"] = zeros(done, plan)
        if (fast := int8_speed(done, plan)) is not None:
            row["in_int8"] = fast
        table["methods"].append(row)
        print(run.name, name, options, row["perplexity_change_percent"], row["bytes"]["on_disk"], flush=True)
        keep(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    every = [name for name in METHODS if name != "none"]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens to measure with")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.compression " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "load_average_at_the_start": os.getloadavg()[0],
        "runs": {},
    }
    for run in options.runs:

        def keep(table: dict[str, Any], name: str = run.name) -> None:
            result["runs"][name] = table
            result["load_average_at_the_end"] = os.getloadavg()[0]
            if options.out:  # what is measured is kept, whatever comes
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")

        measure(run, options.methods, options.tokens, keep)


if __name__ == "__main__":
    main()
