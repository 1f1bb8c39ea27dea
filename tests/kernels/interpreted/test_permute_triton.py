"""The Triton kernels that order tokens by expert, and back, against sums written out in float64."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_check import break_module
from torch import Tensor

from megatrain_kernels import permute, unpermute, unsort
from megatrain_kernels.grouped_mm.permute import combine_rows_op, sort_by_expert, spread_rows_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sums of up to 4 products in float32, and roundings to 16 bits, which the interpreter cuts off.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def off(mine: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """In tolerances; NaN is not below 1."""
    assert mine.shape == true.shape
    if not true.numel():
        return 0.0
    return ((mine.double() - true).abs().max() / true.abs().max().clamp(min=1)).item() / TOLERANCE[dtype]


def worst(
    seed: int, tokens: int, k: int, n_experts: int, size: int, dtype: torch.dtype, weights_dtype: torch.dtype
) -> float:
    """How far the three operations and their gradients are off, in tolerances."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, n_experts, generator=generator).argsort(1)[:, :k]
    x, weights = draw(seed, tokens, size, dtype=dtype), draw(seed + 1, tokens, k, dtype=weights_dtype)
    order = sorted(range(tokens * k), key=lambda choice: (indices.flatten()[choice].item(), choice))
    found = []

    def compare(got: Tensor, true: Tensor, inputs: list[Tensor], truths: list[Tensor]) -> None:
        cotangent = draw(seed + 3, *true.shape, dtype=got.dtype).detach()
        mine = torch.autograd.grad(got, inputs, cotangent)
        exact = torch.autograd.grad(true, truths, cotangent.double(), retain_graph=True)
        for a, b in zip((got, *mine), (true, *exact), strict=True):
            found.append(off(a.detach(), b.detach(), dtype))

    rows, permutation = permute(x, indices, n_experts, backend="triton")
    assert permutation.order.tolist() == order
    wide = x.detach().double().requires_grad_()
    compare(rows, wide[[choice // k for choice in order]], [x], [wide])
    rows = draw(seed + 2, tokens * k, size, dtype=dtype)
    wide, factors = (t.detach().double().requires_grad_() for t in (rows, weights))
    back = wide[permutation.place.flatten()]
    compare(unsort(rows, permutation, backend="triton"), back, [rows], [wide])
    truth = (back.view(tokens, k, size) * factors.unsqueeze(-1)).sum(1)
    compare(unpermute(rows, permutation, weights, backend="triton"), truth, [rows, weights], [wide, factors])
    return max(found) if all(value == value for value in found) else torch.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "n_experts", "size"), [(7, 2, 5, 70), (1, 1, 1, 1), (0, 2, 3, 8), (9, 4, 4, 64)]
)
def test_all_three(tokens: int, k: int, n_experts: int, size: int, dtype: torch.dtype) -> None:
    assert worst(1, tokens, k, n_experts, size, dtype, torch.float32) <= 1


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 20),
    k=st.integers(1, 4),
    more_experts=st.integers(0, 9),
    size=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any(
    seed: int,
    tokens: int,
    k: int,
    more_experts: int,
    size: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> None:
    found = worst(seed, tokens, k, k + more_experts, size, dtype, weights_dtype)
    assert found <= (1 if weights_dtype == torch.float32 else TOLERANCE[torch.bfloat16] / TOLERANCE[dtype])


def test_strided_rows_and_gradients() -> None:
    indices = torch.tensor([[0, 2], [1, 0], [2, 1]])
    wide, rows = draw(1, 6, 10), draw(2, 12, 10)
    x = wide[::2, ::2]
    got, permutation = permute(x, indices, 3, backend="triton")
    assert torch.equal(got, x[permutation.order // 2])
    total = unpermute(rows[::2].T[:5].T, permutation, torch.ones(3, 2), backend="triton")
    torch.testing.assert_close(total, rows[::2, :5][permutation.place].sum(1))
    (for_x,) = torch.autograd.grad(got.sum(), x)  # a gradient whose elements are all one
    assert torch.equal(for_x, torch.full((3, 5), 2.0))


BROKEN = [
    ("source = x + choice // n_slots * x_step", "source = x + choice * 0 * x_step"),
    ("(wide * factor).to", "wide.to"),
    ("tl.store(grad_weights + choice,", "tl.store(grad_weights + index,"),
    ("total += wide * tl.load(placed + index", "total += wide * tl.load(placed + 0 * index"),
    (
        "part = part * tl.load(weights + token * n_slots + slot)",
        "part = part * tl.load(weights + token * n_slots)",
    ),
    ("known = columns < size\n    total", "known = columns < size - 1\n    total"),
]


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_broken_kernel_fails(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: Any = import_module("megatrain_kernels.grouped_mm.triton")
    source = Path(module.__file__).read_text()
    assert right in source
    broken = break_module(tmp_path, source.replace(right, wrong))
    for name in ("spread", "combine"):
        monkeypatch.setattr(module, name, getattr(broken, name))
    assert not worst(1, 7, 2, 5, 70, torch.float32, torch.float32) <= 1


def test_operators_are_well_formed() -> None:
    order, place, _ = sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
    x, rows, weights = (draw(n, *shape).detach() for n, shape in enumerate([(3, 10), (6, 10), (3, 2)]))
    for path in ("triton", "torch"):
        torch.library.opcheck(spread_rows_op, (x, order, None, None, 2, path))
        torch.library.opcheck(spread_rows_op, (x, order, weights, rows, 2, path))
        torch.library.opcheck(combine_rows_op, (rows, place, None, path))
        torch.library.opcheck(combine_rows_op, (rows, place, weights, path))
    mine, plain = (spread_rows_op(x, order, weights, rows, 2, path) for path in ("triton", "torch"))
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(*(combine_rows_op(rows, place, weights, path) for path in ("triton", "torch")))
