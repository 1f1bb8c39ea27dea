"""Memory of fused operations against their composition from plain PyTorch operations.

    python -m benchmarks.memory --out benchmarks/results/memory.json

Kept: bytes of all distinct storages that autograd saves for the backward pass, without weights, which stay anyway.
They are counted in few tokens, where they must agree with a closed formula, and computed by it for a whole micro-batch,
which might not fit here. Peak: the most bytes allocated at once during forward and backward pass, beyond inputs and
weights, as PyTorch's profiler sees them. What the fused loss keeps is mostly the gradient of the vocabulary's matrix,
which does not grow with tokens: in few tokens it is no gain.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe_machine
from megatrain.cli.compose import Source, compose
from megatrain_kernels import attention, linear_cross_entropy, rms_norm, swiglu

DTYPE = torch.bfloat16
SEQ = 1024  # tokens that are measured
WHOLE = {"gpt2_124m": (16, 1024), "llama3_1b": (1, 8192)}  # batch and sequence of a whole micro-batch
EPS = 1e-5


class Shape(NamedTuple):
    """Sizes of one model's operations."""

    batch: int
    seq: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


class Contender(NamedTuple):
    """One way to compute an operation."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    kept: Callable[[Shape], int]
    """Bytes that the backward pass needs, the weights aside: the closed formula."""


class Operation(NamedTuple):
    """An operation's inputs, and its ways."""

    inputs: Callable[[Shape], tuple[list[Tensor], list[Tensor]]]
    """Activations, and weights, all in DTYPE with gradients but for integers."""
    fused: Contender
    plain: Contender


def model_shape(model: str, batch: int, seq: int) -> Shape:
    """Return the sizes of `conf/model/{model}.yaml`."""
    cfg = compose([f"model={model}"], Source()).model
    kv_heads = cfg.n_kv_heads or cfg.n_heads
    head_dim = cfg.head_dim or cfg.hidden_size // cfg.n_heads
    return Shape(batch, seq, cfg.hidden_size, cfg.ffn_size, cfg.vocab_size, cfg.n_heads, kv_heads, head_dim)


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape).to(DTYPE).requires_grad_()


def plain_loss(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return normed.to(DTYPE) * weight, total


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with q, k and v `(batch, heads, seq, head_dim)`, all scores held at once."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the project's own operator (Triton on a GPU), which `return_lse` asks for; seq stands before heads."""
    return attention(*(t.transpose(1, 2) for t in (q, k, v)), return_lse=True)[0]


OPERATIONS = {
    "linear_cross_entropy": Operation(
        lambda s: ([draw(s.tokens, s.hidden), torch.randint(s.vocab, (s.tokens,))], [draw(s.vocab, s.hidden)]),
        Contender(  # both gradients, the number of targets
            lambda x, targets, weight: linear_cross_entropy(x, weight, targets),
            lambda s: 2 * (s.tokens + s.vocab) * s.hidden + 8,
        ),
        Contender(  # x, targets, log-probabilities in float32, the number of targets
            plain_loss, lambda s: 2 * s.tokens * s.hidden + 8 * s.tokens + 4 * s.tokens * s.vocab + 4
        ),
    ),
    "swiglu": Operation(
        lambda s: ([draw(s.tokens, s.ffn), draw(s.tokens, s.ffn)], []),
        Contender(swiglu, lambda s: 2 * 2 * s.tokens * s.ffn),  # gate and up
        Contender(lambda gate, up: F.silu(gate) * up, lambda s: 3 * 2 * s.tokens * s.ffn),  # and silu(gate)
    ),
    "rms_norm_with_residual": Operation(
        lambda s: ([draw(s.tokens, s.hidden), draw(s.tokens, s.hidden)], [draw(s.hidden)]),
        Contender(  # the sum, and 1/rms in float32
            lambda x, residual, weight: rms_norm(x, weight, EPS, residual),
            lambda s: 2 * s.tokens * s.hidden + 4 * s.tokens,
        ),
        Contender(  # the sum in float32, 1/rms, the normalised in DTYPE
            plain_norm, lambda s: 4 * s.tokens * s.hidden + 4 * s.tokens + 2 * s.tokens * s.hidden
        ),
    ),
    "attention": Operation(
        lambda s: (
            [draw(s.batch, n, s.seq, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads)],
            [],
        ),
        Contender(  # q, k, v, output, log-sum-exp in float32
            fused_attention,
            lambda s: s.tokens * (2 * 2 * (s.heads + s.kv_heads) * s.head_dim + 4 * s.heads),
        ),
        Contender(  # q scaled, k and v repeated, probabilities, the mask of booleans
            plain_attention,
            lambda s: s.tokens * s.heads * (3 * 2 * s.head_dim + 2 * s.seq) + s.seq * s.seq,
        ),
    ),
}  # fmt: skip


def forward(contender: Contender, inputs: list[Tensor]) -> Tensor:
    """Return the first result: a fused loss, or what the backward pass begins with."""
    result = contender.run(*inputs)
    return result if isinstance(result, Tensor) else result[0]


def step(contender: Contender, activations: list[Tensor], weights: list[Tensor]) -> int:
    """Run the forward and the backward pass; return the bytes that the forward pass keeps.

    Counted are distinct storages, without those of `weights`.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = contender.run(*activations, *weights)
    result = result if isinstance(result, Tensor) else result[0]
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept = sum(storage.nbytes() for address, storage in saved.items() if address not in known)
    saved.clear()  # what the backward pass has used is free
    result.backward(torch.ones_like(result))
    return kept


def with_peak(action: Callable[[], int]) -> tuple[int, int]:
    """Return what `action` returns, and the most bytes that it had allocated and not yet freed at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return result, max(accumulate(changes), default=0)


def measure(contender: Contender, operation: Operation, shape: Shape) -> dict[str, int]:
    """Measure kept and peak bytes at `shape`.

    Raises:
        ValueError: the closed formula does not give the bytes that were counted.
    """
    torch.manual_seed(0)
    activations, weights = operation.inputs(shape)
    kept, peak = with_peak(lambda: step(contender, activations, weights))
    if kept != contender.kept(shape):
        raise ValueError(f"{kept} bytes are kept, but the formula says {contender.kept(shape)}: {shape}")
    return {"kept": kept, "peak": peak}


def compare(shape: Shape, whole: Shape) -> dict[str, dict[str, dict[str, int]]]:
    """Compare all operations, measured at `shape` and by the formula at `whole`."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, operation in OPERATIONS.items():
        contenders = {"fused": operation.fused, "plain": operation.plain}
        found[name] = {
            way: {**measure(each, operation, shape), "kept_whole_micro_batch": each.kept(whole)}
            for way, each in contenders.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    shapes: dict[str, object] = {}
    for model, size in WHOLE.items():
        shape, whole = model_shape(model, 1, SEQ), model_shape(model, *size)
        sizes = {"measured": shape._asdict(), "whole_micro_batch": whole._asdict()}
        shapes[model] = {**sizes, "bytes": compare(shape, whole)}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "dtype": str(DTYPE),
        "shapes": shapes,
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
