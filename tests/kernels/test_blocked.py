"""Norms and rotary positions over many blocks, odd strides and half precision."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megatrain_kernels import layer_norm, linear_cross_entropy, rms_norm, rotary, swiglu

# A result is rounded once to its type (half a unit in the last place), relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(got: tuple[Tensor, ...], true: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for number, (mine, truth) in enumerate(zip(got, true, strict=True)):
        error = (mine.double() - truth).abs().max().item()
        assert error <= TOLERANCE[dtype] * truth.abs().max().item(), f"result {number}: {error}"


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([0, 1, 2, 7, 31]),
    size=st.sampled_from([3, 16, 67]),  # of one element only rounding is left in the gradient
    block=st.sampled_from([1, 50, 300, 1 << 18]),
    transposed=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rms_norm_in_blocks(
    seed: int, rows: int, size: int, block: int, transposed: bool, dtype: torch.dtype
) -> None:
    x = draw(seed, size, rows).T if transposed else draw(seed, rows, size)
    x, weight, cotangent = (t.to(dtype) for t in (x, draw(seed + 1, size), draw(seed + 2, rows, size)))
    x.requires_grad_(), weight.requires_grad_()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    truth = wide_x / torch.sqrt(wide_x.square().mean(-1, keepdim=True) + 1e-3) * wide_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("megatrain_kernels.blocks"), "BLOCK_ELEMENTS", block)
        got = rms_norm(x, weight, 1e-3)
        assert isinstance(got, Tensor)
        grads = torch.autograd.grad(got, (x, weight), cotangent)
    true_grads = torch.autograd.grad(truth, (wide_x, wide_weight), cotangent.double())
    if rows:
        assert_near((got.detach(), grads[1]), (truth.detach(), true_grads[1]), dtype)
        # Of a row of one element the gradient is a difference of nearly equal numbers: measured against the terms.
        scale = (true_grads[0].abs() + (cotangent.double() * truth.detach() / wide_x.detach()).abs()).max()
        assert (grads[0].double() - true_grads[0]).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shift", [0.0, 10.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_half_precision_layer_norm_sums_its_gradients_in_float32(shift: float, with_bias: bool) -> None:
    """torch's own weight and bias gradients are off by 4 to 10 % here."""
    x = (draw(1, 4096, 33) + shift).bfloat16().requires_grad_()
    weight, bias = (draw(seed, 33).bfloat16().requires_grad_() for seed in (2, 3))
    inputs = [x, weight, bias] if with_bias else [x, weight]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    cotangent = draw(4, 4096, 33).bfloat16()
    truth = F.layer_norm(wide[0], (33,), *wide[1:], eps=1e-5)
    got = layer_norm(x, weight, bias if with_bias else None, 1e-5)
    grads = torch.autograd.grad(got, inputs, cotangent)
    true_grads = torch.autograd.grad(truth, wide, cotangent.double())
    assert_near((got.detach(), *grads), (truth.detach(), *true_grads), torch.bfloat16)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    batch=st.sampled_from([1, 2, 5]),
    seq=st.sampled_from([1, 7]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    half=st.sampled_from([1, 3, 8]),
    block=st.sampled_from([1, 100, 1 << 18]),
    each_row=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rotary_in_blocks(
    seed: int,
    batch: int,
    seq: int,
    heads: tuple[int, int],
    half: int,
    block: int,
    each_row: bool,
    dtype: torch.dtype,
) -> None:
    """q and k are views with heads before seq, as after a split of one projection."""
    angles = 10 * (draw(seed + 9, batch, seq, half) if each_row else draw(seed + 9, seq, half))
    inputs = [
        draw(seed + n, batch, n, seq, 2 * half).transpose(1, 2).to(dtype).requires_grad_() for n in heads
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("megatrain_kernels.rope.torch"), "BLOCK_ELEMENTS", block)
        results = rotary(inputs[0], inputs[1], angles.cos(), angles.sin())
        cotangents = [draw(seed + 20 + i, *x.shape).to(dtype) for i, x in enumerate(inputs)]
        grads = torch.autograd.grad(results, inputs, cotangents)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    for x, got, grad, cotangent in zip(inputs, results, grads, cotangents, strict=True):
        for before, after, by in ((x, got, turn), (cotangent, grad, turn.conj())):
            wide = before.detach().double()
            turned = torch.complex(wide[..., :half], wide[..., half:]) * by
            assert_near((after.detach(),), (torch.cat([turned.real, turned.imag], -1),), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_swiglu_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("megatrain_kernels.blocks"), "BLOCK_ELEMENTS", 40)
    gate, up = draw(1, 13, 7).T.to(dtype).requires_grad_(), draw(2, 7, 13).to(dtype).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    cotangent = draw(3, 7, 13).to(dtype)
    truth = wide[0] / (1 + torch.exp(-wide[0])) * wide[1]
    got = swiglu(gate, up)
    grads = torch.autograd.grad(got, (gate, up), cotangent)
    true_grads = torch.autograd.grad(truth, wide, cotangent.double())
    assert_near((got.detach(), *grads), (truth.detach(), *true_grads), dtype)


def saved_bytes(result: Tensor, inputs: list[Tensor]) -> int:
    """Bytes of storage that the backward pass of `result` keeps beyond its inputs."""
    given = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}
    stack = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        for t in getattr(node, "saved_tensors", ()):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        stack += [following for following, _ in node.next_functions]
    return sum(size for place, size in kept.items() if place not in given)


def test_saved_for_backward_is_what_the_formulas_say() -> None:
    rows, size = 64, 48
    x, up = (draw(seed, rows, size).bfloat16().requires_grad_() for seed in (1, 2))
    weight = draw(3, size).bfloat16().requires_grad_()
    normed = rms_norm(x, weight, 1e-5)
    assert isinstance(normed, Tensor)
    assert saved_bytes(normed, [x, weight]) == 4 * rows  # 1/rms of each row
    assert saved_bytes(swiglu(x, up), [x, up]) == 0


def test_no_gradients_are_made_for_what_needs_none() -> None:
    x, weight = draw(1, 6, 4).requires_grad_(), draw(2, 5, 4)
    loss = linear_cross_entropy(x, weight, torch.arange(6) % 5)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is None
