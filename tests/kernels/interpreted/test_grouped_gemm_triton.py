"""The Triton kernels of grouped products against loops in float64."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_check import break_module
from torch import Tensor

from megatrain_kernels import grouped_gemm

# Sums of up to 70 products of normal numbers, of size 40: roundings of the type, relative to the largest value.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SIZES = {
    "uneven": [37, 1, 16, 16],
    "empty groups": [0, 33, 0, 17, 0],
    "one group": [50],
    "no tokens": [0, 0, 0],
    "many": [3, 0, 20, 1, 1, 0, 0, 16, 31],
}


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def assert_close(got: Tensor, truth: Tensor, what: str) -> None:
    assert got.shape == truth.shape
    if truth.numel():
        error = (got.double() - truth).abs().max() / truth.abs().max().clamp(min=1)
        assert error.item() <= TOLERANCE[got.dtype], f"{what}: {error.item():.1e}"  # NaN is not


def check(x: Tensor, weights: Tensor, sizes: list[int]) -> None:
    """Output and both gradients; x and weights may be views of leaves."""
    truths = [t.detach().double().requires_grad_() for t in (x, weights)]
    parts = [rows @ w.T for rows, w in zip(truths[0].split(sizes), truths[1], strict=True)]
    truth = torch.cat(parts)
    got = grouped_gemm(x, weights, torch.tensor(sizes), backend="triton")
    assert_close(got.detach(), truth.detach(), "output")
    cotangent = draw(3, *truth.shape, dtype=x.dtype).detach()
    expected = torch.autograd.grad(truth, truths, cotangent.double())
    for mine, true in zip(torch.autograd.grad(got, (x, weights), cotangent), expected, strict=True):
        assert_close(mine, true, "gradient")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("in_size", "out_size"), [(19, 35), (64, 16)])
def test_product(sizes: list[int], dtype: torch.dtype, in_size: int, out_size: int) -> None:
    x, weights = (
        draw(1, sum(sizes), in_size, dtype=dtype),
        draw(2, len(sizes), out_size, in_size, dtype=dtype),
    )
    check(x, weights, sizes)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    in_size=st.integers(1, 70),
    out_size=st.integers(1, 70),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
)
def test_any(seed: int, sizes: list[int], in_size: int, out_size: int, dtype: torch.dtype) -> None:
    x = draw(seed, sum(sizes), in_size, dtype=dtype)
    check(x, draw(seed + 1, len(sizes), out_size, in_size, dtype=dtype), sizes)


BROKEN = [
    ("here, there = rows < end, cols < out_size", "here, there = rows < end - 1, cols < out_size"),
    ("w_at = w + group * w_group", "w_at = w + 0 * group * w_group"),
    ("(tile - first_tile) * BLOCK_M", "tl.where(tile == first_tile, 0, BLOCK_M // 2)"),
    ("known = inner < in_size - k", "known = inner < in_size - k - 1"),
    ("known = inner < count - k", "known = inner < count - k - 1"),
    (
        "start = tl.sum(tl.where(g < group, size, 0), 0)",
        "start = tl.sum(tl.where(g < group, size, 0), 0) // 2",
    ),
    ("b_at += BLOCK_K * b_row", "b_at += 0 * b_row"),
]


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_broken_kernel_fails(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: Any = import_module("megatrain_kernels.grouped_mm.triton")
    source = Path(module.__file__).read_text()
    assert right in source
    broken = break_module(tmp_path, source.replace(right, wrong))
    for name in ("rows_product", "outer_product"):
        monkeypatch.setattr(module, name, getattr(broken, name))
    x, weights = draw(1, 70, 19, dtype=torch.float32), draw(2, 4, 35, 19, dtype=torch.float32)
    with pytest.raises(AssertionError):
        check(x, weights, [37, 1, 0, 32])


def test_strided_inputs() -> None:
    x, weights = draw(1, 80, 34, dtype=torch.float32), draw(2, 3, 17, 70, dtype=torch.float32)
    check(x[::2, ::2], weights[:, :, ::2].mT[:, :, :17], [13, 0, 27])


def test_an_expanded_gradient() -> None:
    x, weights = draw(1, 20, 8, dtype=torch.float32), draw(2, 2, 24, 8, dtype=torch.float32)
    grouped_gemm(x, weights, torch.tensor([7, 13]), backend="triton").sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    expected = torch.cat([weights[0].sum(0).expand(7, 8), weights[1].sum(0).expand(13, 8)])
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.grad[1], x[7:].sum(0).expand(24, 8), rtol=1e-5, atol=1e-5)


def test_float64_is_refused() -> None:
    x, weights = draw(1, 4, 8, dtype=torch.float64), draw(2, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16 or float32; got torch\.float64"):
        grouped_gemm(x, weights, torch.tensor([1, 3]), backend="triton")
