"""Attention against its definition in float64: inputs of any kind, and how far a result may be off."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatrain_kernels import attention
from megatrain_kernels.flash_attention.reference import attention_reference

ROUNDINGS = {torch.float64: 64, torch.float32: 32, torch.float16: 4, torch.bfloat16: 4}
"""Roundings of a type that an element may be off, relative to the tensor's largest.

16-bit types: weights, score gradients and the saved output are rounded once before a product, the result once more;
sums are in float32. float32 and float64: a score of a few units is rounded before its exponential (its error is the
weight's relative one), sums run over a few hundred terms.
"""


@dataclass(frozen=True)
class Problem:
    """Sizes are batch, q_seq, k_seq, heads, kv_heads, head_dim, v_dim; `documents`: mean length of random documents."""

    sizes: tuple[int, int, int, int, int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    documents: int | None = None
    layout: str = (
        "contiguous"  # or views of one projection ("fused"), or heads before the sequence ("heads first")
    )
    seed: int = 0


CASES = {
    "causal": Problem((2, 97, 97, 2, 1, 64, 64)),
    "full": Problem((1, 97, 97, 2, 2, 64, 64), {"causal": False}),
    "groups of three": Problem((1, 70, 70, 6, 2, 64, 64)),
    "head 96": Problem((1, 80, 80, 1, 1, 96, 96)),
    "head 128": Problem((1, 80, 80, 1, 1, 128, 128)),
    "head 192, values 128": Problem((1, 80, 80, 1, 1, 192, 128), dtype=torch.float16),
    "head 256": Problem((1, 80, 80, 1, 1, 256, 256), {"softcap": 50.0}, torch.float16),
    "head 8, values 24": Problem((1, 40, 40, 1, 1, 8, 24)),
    "one token": Problem((2, 1, 1, 2, 1, 64, 64)),
    "whole blocks": Problem((1, 128, 128, 1, 1, 64, 64)),
    "window": Problem((1, 131, 131, 2, 1, 64, 64), {"window": 37}),
    "window of one": Problem((1, 70, 70, 1, 1, 64, 64), {"window": 1}),
    "window, later keys too": Problem((1, 131, 131, 1, 1, 64, 64), {"window": 37, "causal": False}),
    "documents": Problem((2, 131, 131, 1, 1, 64, 64), documents=20),
    "documents, full": Problem((1, 131, 131, 1, 1, 64, 64), {"causal": False}, documents=30, seed=1),
    "long documents": Problem((1, 300, 300, 1, 1, 64, 64), documents=130),
    "documents and window": Problem((1, 131, 131, 2, 1, 64, 64), {"window": 16}, documents=40),
    "documents, offset": Problem((1, 40, 131, 1, 1, 64, 64), {"q_offset": 77}, documents=30),
    "soft-cap": Problem((1, 97, 97, 2, 1, 64, 64), {"softcap": 1.5}),
    "scale": Problem((1, 40, 40, 1, 1, 64, 64), {"scale": 0.3}),
    "decode": Problem((2, 1, 131, 4, 2, 64, 64), {"q_offset": 130}),
    "prefill in parts": Problem((1, 41, 131, 1, 1, 64, 64), {"q_offset": 90}),
    "queries after all keys": Problem((1, 40, 70, 1, 1, 64, 64), {"q_offset": 100}),
    "some queries before all keys": Problem((1, 70, 40, 1, 1, 64, 64), {"q_offset": -30}),
    "queries before all keys": Problem((1, 40, 40, 1, 1, 64, 64), {"q_offset": -40}),
    "queries past the window": Problem((1, 70, 40, 1, 1, 64, 64), {"q_offset": 20, "window": 30}),
    "more queries than keys": Problem((1, 101, 53, 1, 1, 64, 64), {"causal": False}),
    "no keys": Problem((1, 3, 0, 1, 1, 64, 64)),
    "views of one projection": Problem((2, 67, 67, 4, 2, 64, 32), layout="fused"),
    "heads first": Problem((2, 67, 67, 4, 2, 64, 32), layout="heads first"),
}


def draw(problem: Problem) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v with gradients, and the options of the call with doc_ids."""
    batch, q_seq, k_seq, heads, kv_heads, dim, v_dim = problem.sizes
    generator = torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.dtype).requires_grad_()

    if problem.layout == "fused":
        assert q_seq == k_seq
        parts = normal(batch, q_seq, heads * dim + kv_heads * (dim + v_dim)).split(
            [heads * dim, kv_heads * dim, kv_heads * v_dim], dim=-1
        )
        tensors = [x.unflatten(-1, (n, -1)) for x, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)]
    else:
        shapes = [(q_seq, heads, dim), (k_seq, kv_heads, dim), (k_seq, kv_heads, v_dim)]
        if problem.layout == "heads first":
            tensors = [normal(batch, n, seq, size).transpose(1, 2) for seq, n, size in shapes]
        else:
            tensors = [normal(batch, *shape) for shape in shapes]
    options = dict(problem.options)
    if problem.documents:
        starts = torch.rand(batch, k_seq, generator=generator) < 1 / problem.documents
        options["doc_ids"] = starts.cumsum(1)
    return tensors, options


def error(got: Tensor, truth: Tensor) -> float:
    """The largest deviation, relative to the largest true value; NaN or infinite where only one of them is finite."""
    assert got.shape == truth.shape
    nothing = truth.isneginf()
    if not torch.equal(got.isneginf(), nothing):
        return float("inf")
    off = (got.double() - truth).masked_fill(nothing, 0).abs()
    largest = truth.masked_fill(nothing, 0).abs()
    return (off.max() / largest.max().clamp(min=1)).item() if off.numel() else 0.0


def errors(problem: Problem, backend: str) -> dict[str, float]:
    """How far the output, the log-sum-exp and the gradients are off, in tolerances: right results stay under 1.

    The log-sum-exp has a gradient of its own.
    """
    inputs, options = draw(problem)
    truths = [t.detach().double().requires_grad_() for t in inputs]
    out, lse = attention(*inputs, return_lse=True, backend=backend, **options)
    true_out, true_lse = attention_reference(*truths, **options)
    assert out.dtype == problem.dtype
    generator = torch.Generator().manual_seed(problem.seed + 1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, lse)]
    grads = torch.autograd.grad((out, lse), inputs, cotangents)
    true_grads = torch.autograd.grad((true_out, true_lse), truths, [t.double() for t in cotangents])
    wide = torch.promote_types(problem.dtype, torch.float32)
    # A capped score is rounded as a number as large as the cap.
    extra = 2 * (problem.options.get("softcap") or 0) * torch.finfo(wide).eps
    allowed = ROUNDINGS[problem.dtype] * torch.finfo(problem.dtype).eps + extra
    found = {"lse": error(lse, true_lse) / (ROUNDINGS[wide] * torch.finfo(wide).eps + extra)}
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, mine, true in zip(names, (out, *grads), (true_out, *true_grads), strict=True):
        assert mine.dtype == problem.dtype
        found[name] = error(mine, true) / allowed
    return found


def right(found: dict[str, float]) -> bool:
    return all(value <= 1 for value in found.values())  # NaN is not
