"""Products of one input: one by one, with the input's gradient added up by the products, and as a single product.

    python -m benchmarks.joined_products --out benchmarks/results/joined_products.json

On a GPU in bf16 at the shapes of published models; on a CPU with a sixteenth of the tokens. Times are medians of
forward and backward pass together, in turns.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.machine import describe_machine
from megatrain.nn.joined import _Products

SHAPES = {
    "gpt2_124m q, k, v": (16384, 768, (768, 768, 768)),
    "llama3_1b q, k, v": (16384, 2048, (2048, 512, 512)),
    "llama3_8b q, k, v": (8192, 4096, (4096, 1024, 1024)),
    "llama3_8b gate, up": (8192, 4096, (14336, 14336)),
}
"""Tokens, inputs, and the outputs of each product."""
TURNS = 7
Way = Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]


def one_by_one(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight) for weight in weights)


def summed(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _Products.apply(x, False, len(weights), *weights)
    return made


def joined(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _Products.apply(x, True, len(weights), *weights)
    return made


WAYS: dict[str, Way] = {"one by one": one_by_one, "summed": summed, "joined": joined}


def measure(tokens: int, inputs: int, outputs: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each way."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, weights = draw(tokens, inputs).requires_grad_(), [draw(n, inputs).requires_grad_() for n in outputs]
    grads = [draw(tokens, n) for n in outputs]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(TURNS + 1):  # the first one warms up
        for name, way in WAYS.items():
            _wait(device)
            begin = time.perf_counter()
            torch.autograd.grad(way(x, weights), (x, *weights), grads)
            _wait(device)
            if turn:
                found[name].append((time.perf_counter() - begin) * 1e3)
    return {name: median(times) for name, times in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = 1 if device.type == "cuda" else 16
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "device": device.type,
        "tokens_divided_by": share,
        "ms": {name: measure(n // share, *sizes, device) for name, (n, *sizes) in SHAPES.items()},
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
