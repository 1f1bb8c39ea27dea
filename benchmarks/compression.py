"""What each method of `megatrain compress` costs and saves, on trained runs.

    python -m benchmarks.compression runs/default runs/larger --out benchmarks/results/compression.json

Every method compresses the same weights of a run, is calibrated on one part of the text that the run has held out, and
measured on the other part. Sizes are those of the written files beside those of `megatrain export` in 16 bits. Speeds
are of this machine and this load, float32 unless said otherwise.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from megatrain.cli.main import main as megatrain
from megatrain.train.files import read_config

METHODS: dict[str, list[str]] = {
    "int8": [],
    "int8-dynamic": [],
    "fp8": [],
    "int4-gptq": [],
    "int4-awq": [],
    "int4": [],
    "magnitude": ["--sparsity", "0.3"],
    "wanda": ["--sparsity", "0.3"],
    "magnitude-2:4": [],
    "wanda-2:4": [],
}
GROUPS = ("32", "128")


def cases(run: Path, methods: list[str]) -> list[tuple[str, list[str]]]:
    """Return `methods` with their flags, in all groups that the model's layers can have, and with two prunings."""
    cfg = read_config(run).model
    inputs = {cfg.hidden_size, cfg.ffn_size, cfg.n_heads * cfg.qk_head_dim}
    found: list[tuple[str, list[str]]] = []
    for method, flags in ((name, METHODS[name]) for name in methods if name in METHODS):
        groups = [group for group in GROUPS if all(size % int(group) == 0 for size in inputs)]
        if method.startswith("int4"):
            found += [(method, ["--group", group]) for group in groups]
        else:
            found.append((method, flags))
    serves = cfg.n_heads // cfg.kv_heads
    if "prune" not in methods:
        return found
    found.append(("prune", ["--ffn", str(cfg.ffn_size * 3 // 4)]))
    found.append(("prune", ["--heads", str(cfg.n_heads - serves), "--ffn", str(cfg.ffn_size * 3 // 4)]))
    return found


def called(*words: str) -> None:
    """Run a `megatrain` command in this process."""
    if megatrain(list(words)):
        raise SystemExit(f"megatrain {' '.join(words)} failed")


def measure(run: Path, methods: list[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand the table of a run to `keep` after each of its rows."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        called("export", str(run), str(place / "whole"), "--dtype", "fp16")
        whole = sum(path.stat().st_size for path in (place / "whole").glob("*.safetensors"))
        for number, (method, flags) in enumerate(cases(run, methods)):
            report = place / "report.json"
            began = time.perf_counter()
            called(
                "compress",
                str(run),
                str(place / str(number)),
                "--method",
                method,
                *flags,
                "--json",
                str(report),
            )
            found = json.loads(report.read_text())
            before, after = found["before"], found["after"]
            model = {
                "step": found["step"],
                "parameters": before["parameters"],
                "exported_bytes": whole,
                **before["text"],
            }
            row = {
                "method": method,
                "flags": " ".join(flags),
                "parameters": after["parameters"],
                "bytes": found["bytes"],
                "disk_ratio_to_export": round(whole / found["bytes"]["on_disk"], 3),
                "perplexity": after["text"]["perplexity"],
                "perplexity_change_percent": round(
                    100 * (after["text"]["perplexity"] / before["text"]["perplexity"] - 1), 3
                ),
                "bits_per_byte": after["text"]["bits_per_byte"],
                "seconds": round(time.perf_counter() - began, 1),
                "speed": {key: round(value) for key, value in after.items() if key.endswith("per_sec")},
                "speed_before": {
                    key: round(value) for key, value in before.items() if key.endswith("per_sec")
                },
            }
            row |= {key: found[key] for key in ("zeros", "after_in_int8") if key in found}
            rows.append(row)
            keep({**model, "methods": rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    every = [*METHODS, "prune"]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
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

        measure(run, options.methods, keep)


if __name__ == "__main__":
    main()
