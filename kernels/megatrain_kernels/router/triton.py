"""Triton kernels of the router's gate: one program takes a block of tokens and all their experts.

A token's experts are found one after the other, each the best of those that are left (the first of equals).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr
from megatrain_kernels.router.reference import SMALL, GateRule

ELEMENTS = 2048  # of one program: 16 a thread (not tuned)


@triton.jit
def activate(
    logits: Tile,  # (ROWS, WIDTH)
    known: Tile,  # (ROWS, WIDTH)
    SIGMOID: constexpr,
) -> Tile:
    """Return scores `(ROWS, WIDTH)`, 0 where there is no expert. Exponents are negative, so none overflows."""
    if SIGMOID:
        shrunk = tl.exp(-tl.abs(logits))
        scores = tl.where(logits < 0.0, shrunk, 1.0) / (1.0 + shrunk)
    else:
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        powers = tl.where(known, powers, 0.0)
        scores = powers / tl.sum(powers, 1)[:, None]
    return tl.where(known, scores, 0.0)


@triton.jit
def best(
    values: Tile,  # (ROWS, COUNT)
    free: Tile,  # (ROWS, COUNT)
    places: Tile,  # (1, COUNT)
    COUNT: constexpr,
) -> Tile:
    """Return each row's place of the largest value that is free; COUNT where none is."""
    largest = tl.max(tl.where(free, values, float("-inf")), 1)
    return tl.min(tl.where(free & (values >= largest[:, None]), places, COUNT), 1)


@triton.jit
def inside_best_groups(
    values: Tile,  # (ROWS, WIDTH)
    ROWS: constexpr, WIDTH: constexpr, GROUPS: constexpr, TOP_GROUPS: constexpr,
) -> Tile:  # fmt: skip
    """Return `values`, -inf outside of each row's TOP_GROUPS groups with the largest sums of two values."""
    size: constexpr = WIDTH // GROUPS
    grouped = tl.reshape(values, (ROWS, GROUPS, size))
    inner = tl.arange(0, size)[None, None, :]
    largest = tl.max(grouped, 2)
    first = tl.min(tl.where(grouped >= largest[:, :, None], inner, size), 2)
    second = tl.max(tl.where(inner == first[:, :, None], float("-inf"), grouped), 2)
    sums = largest + second
    groups = tl.arange(0, GROUPS)[None, :]
    free = tl.full((ROWS, GROUPS), 1, tl.int1)
    for _ in tl.static_range(TOP_GROUPS):
        free = free & (groups != best(sums, free, groups, GROUPS)[:, None])
    grouped = tl.where(free[:, :, None], float("-inf"), grouped)
    return tl.reshape(grouped, (ROWS, WIDTH))


@triton.jit(do_not_specialize=["tokens"])
def gate_kernel(
    logits: Pointer,  # (tokens, experts), as all tensors dense
    bias: Pointer,  # (experts,)
    indices: Pointer,  # (tokens, TOP_K)
    weights: Pointer,  # (tokens, TOP_K)
    scores: Pointer,  # (tokens, experts)
    tokens: Number, experts: Number, scale: Number, small: Number,
    TOP_K: constexpr, GROUPS: constexpr, TOP_GROUPS: constexpr, SIGMOID: constexpr, BIASED: constexpr,
    NORMALIZE: constexpr, ROWS: constexpr, WIDTH: constexpr, SLOTS: constexpr,
) -> None:  # fmt: skip
    """Compute scores, choice and weights of ROWS tokens. SLOTS is a power of two, at least TOP_K."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, slots = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    here = (rows < tokens)[:, None]
    # The second condition is always true: it gives the mask its full shape.
    known = (columns < experts) & (rows >= 0)[:, None]
    at = rows[:, None] * experts + columns
    raw = tl.load(logits + at, mask=here & known, other=0.0)
    raw = tl.where(known, raw, float("-inf"))
    found = activate(raw, known, SIGMOID)
    tl.store(scores + at, found, mask=here & known)
    choice = found
    if BIASED:
        choice += tl.load(bias + columns, mask=columns < experts, other=0.0)
    # NaN counts as the best, as in torch.topk, so that it shows.
    choice = tl.where(choice == choice, choice, float("inf"))
    if GROUPS > 1:
        choice = inside_best_groups(choice, ROWS, WIDTH, GROUPS, TOP_GROUPS)
    free = known
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    picked = tl.zeros((ROWS, SLOTS), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = best(choice, free, columns, WIDTH)[:, None]
        free = free & (columns != expert)
        value = tl.sum(tl.where(columns == expert, found, 0.0), 1)[:, None]
        chosen = tl.where(slots == slot, expert, chosen)
        picked = tl.where(slots == slot, value, picked)
    if NORMALIZE:
        picked = picked / (tl.sum(picked, 1) + small)[:, None]
    to = rows[:, None] * TOP_K + slots
    tl.store(indices + to, chosen.to(tl.int64), mask=here & (slots < TOP_K))
    tl.store(weights + to, picked * scale, mask=here & (slots < TOP_K))


@triton.jit(do_not_specialize=["tokens"])
def gate_backward_kernel(
    indices: Pointer,  # (tokens, TOP_K), as all tensors dense
    scores: Pointer,  # (tokens, experts)
    grad_weights: Pointer,  # (tokens, TOP_K)
    grad_scores: Pointer,  # (tokens, experts)
    grad_logits: Pointer,  # (tokens, experts)
    tokens: Number, experts: Number, scale: Number, small: Number,
    TOP_K: constexpr, SIGMOID: constexpr, NORMALIZE: constexpr, ROWS: constexpr, WIDTH: constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of the logits of ROWS tokens, as `reference.gate_backward_reference` does."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    here = rows < tokens
    mask = here[:, None] & (columns < experts)
    at = rows[:, None] * experts + columns
    found = tl.load(scores + at, mask=mask, other=0.0)
    grad = tl.load(grad_scores + at, mask=mask, other=0.0)
    total = tl.zeros((ROWS,), tl.float32) + small
    product = tl.zeros((ROWS,), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(indices + rows * TOP_K + slot, mask=here, other=0)
        score = tl.load(scores + rows * experts + expert, mask=here, other=1.0)
        total += score
        product += score * scale * tl.load(grad_weights + rows * TOP_K + slot, mask=here, other=0.0)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(indices + rows * TOP_K + slot, mask=here, other=0)
        value = scale * tl.load(grad_weights + rows * TOP_K + slot, mask=here, other=0.0)
        if NORMALIZE:
            value = (value - product / total) / total
        grad += tl.where(columns == expert[:, None], value[:, None], 0.0)
    if SIGMOID:
        grad = grad * found * (1.0 - found)
    else:
        grad = found * (grad - tl.sum(grad * found, 1)[:, None])
    tl.store(grad_logits + at, grad, mask=mask)


def _constants(rule: GateRule, experts: int) -> dict[str, Any]:
    """Return the rule and the sizes of blocks."""
    width = max(2, triton.next_power_of_2(experts))
    rows = 8 if interpreting() else max(1, ELEMENTS // width)
    flags = {"TOP_K": rule.top_k, "SIGMOID": rule.scores == "sigmoid", "NORMALIZE": rule.normalize}
    return flags | {"ROWS": rows, "WIDTH": width}


def gate(logits: Tensor, bias: Tensor | None, rule: GateRule) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `reference.gate_reference` returns, in float32; groups and their sizes are powers of two."""
    logits, (tokens, experts) = logits.contiguous(), logits.shape
    indices = logits.new_empty(tokens, rule.top_k, dtype=torch.int64)
    weights, scores = logits.new_empty(tokens, rule.top_k), torch.empty_like(logits)
    constants = _constants(rule, experts)
    more = {"GROUPS": rule.n_groups, "TOP_GROUPS": rule.top_groups, "BIASED": bias is not None}
    more["SLOTS"] = triton.next_power_of_2(rule.top_k)
    tensors = (logits, logits if bias is None else bias.contiguous(), indices, weights, scores)
    if tokens:
        grid = (triton.cdiv(tokens, constants["ROWS"]),)
        gate_kernel[grid](*tensors, tokens, experts, rule.scale, SMALL, **constants, **more)
    return indices, weights, scores


def gate_backward(
    indices: Tensor, scores: Tensor, grad_weights: Tensor, grad_scores: Tensor, rule: GateRule
) -> Tensor:
    """Return what `reference.gate_backward_reference` returns."""
    tokens, experts = scores.shape
    made = torch.empty_like(scores)
    constants = _constants(rule, experts)
    tensors = (indices, scores, grad_weights.contiguous(), grad_scores.contiguous(), made)
    if tokens:
        grid = (triton.cdiv(tokens, constants["ROWS"]),)
        gate_backward_kernel[grid](*tensors, tokens, experts, rule.scale, SMALL, **constants)
    return made
