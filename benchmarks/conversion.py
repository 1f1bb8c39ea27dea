"""Memory and time of importing and exporting a model with the shapes of Llama 3 8B, in bf16.

    python -m benchmarks.conversion --dir DIR --layers 4 8 --out benchmarks/results/conversion.json

Weights are random. Widths, heads and vocabulary are those of the 8B model, so its largest tensors are there; the
number of layers is chosen, since all 32 need 50 GB of disk. Memory must not depend on it: that is what two numbers
show. Each conversion is a process of its own; its memory is the most that it held at once (ru_maxrss, which counts
shared and mapped pages too).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from megatrain.checkpoint.reader import TensorSpec
from megatrain.checkpoint.rows import row_pieces
from megatrain.checkpoint.safetensors_file import write_shards
from megatrain.data.tokenizer import train_bpe
from megatrain.models.llama3.config import Llama3Config
from megatrain.models.registry import get_spec

SHARD_BYTES = 5_000_000_000


def make_model(directory: Path, layers: int) -> int:
    """Write a Hugging Face directory with random weights in bf16; return its parameters."""
    cfg = Llama3Config(n_layers=layers, hidden_size=4096, n_heads=32, n_kv_heads=8, ffn_size=14336)
    spec = get_spec("llama3")
    with torch.device("meta"):
        model = spec.build(cfg)
    exported = spec.weights(cfg).export(dict(model.named_parameters()))
    specs = {name: TensorSpec(torch.bfloat16, tensor.shape) for name, tensor in exported.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        for name, each in specs.items():
            for start, stop in row_pieces(each):
                yield name, torch.randn((stop - start, *each.size[1:]), generator=draw).mul_(0.02).bfloat16()

    directory.mkdir()
    write_shards(directory, specs, tensors(), shard_bytes=SHARD_BYTES, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(spec.hf_config(cfg)))
    train_bpe(iter(["the square of the number " * 9]), vocab_size=300).save_pretrained(directory)
    return sum(each.size.numel() for each in specs.values())


def run(*words: str) -> dict[str, float]:
    """Run `megatrain` with these words; return its seconds and the most memory that it held, in GB."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "megatrain", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, words
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
    }


def measure(folder: Path, layers: int) -> dict[str, object]:
    """Import and export a model of that many layers; return what it took."""
    parameters = make_model(folder / "source", layers)
    imported = run("import", f"{folder}/source", "run.name=model", f"run.dir={folder}/runs")
    shutil.rmtree(folder / "source")
    exported = run("export", f"{folder}/runs/model", f"{folder}/back", "--dtype", "bf16")
    return {"layers": layers, "parameters": parameters, "import": imported, "export": exported}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="with 8 bytes of space for each parameter")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    sizes = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            sizes.append(measure(Path(folder), layers))
    result = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "models": sizes}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
