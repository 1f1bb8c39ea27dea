"""Orthogonalization against the singular values' own polynomial, in float64 by NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatrain_kernels import orthogonalize

# Relative to the result, which is near 1. The polynomial is up to 3.4 times as steep as its argument, five times over:
# 3.4^5 = 460 roundings of the smallest singular values, each 1e-16 or 6e-8; bfloat16 inputs are exact here, and only
# the result is rounded to them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 8e-3}
SHAPES = [(5, 3), (3, 5), (16, 16), (1, 7), (7, 1), (4, 6, 5), (2, 3, 9, 4)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_singular_values(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """U p(...p(s/|s|)) Vᵀ for one matrix: the iteration only moves singular values."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


def expected(x: Tensor, steps: int = 5) -> np.ndarray:
    matrices = x.double().numpy().reshape(-1, *x.shape[-2:])
    return np.stack([by_singular_values(each, steps) for each in matrices]).reshape(tuple(x.shape))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_moves_singular_values_only(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and dtype == torch.bfloat16:
        pytest.skip("the reference computes in the type that it is given")
    x = draw(shape, dtype)
    got = orthogonalize(x, backend=backend)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    np.testing.assert_allclose(got.double().numpy(), expected(x), rtol=0, atol=TOLERANCE[dtype])


def test_is_near_the_polar_factor() -> None:
    """From singular values that are not tiny, all come into 0.68 to 1.21 (extremes of p there); signs never turn."""
    x = draw((24, 16), torch.float64, seed=1)
    left, _, right = np.linalg.svd(x.numpy(), full_matrices=False)
    in_its_basis = left.T @ orthogonalize(x).numpy() @ right.T
    assert np.diag(in_its_basis).min() > 0.65
    assert np.diag(in_its_basis).max() < 1.25
    np.testing.assert_allclose(in_its_basis - np.diag(np.diag(in_its_basis)), 0, atol=1e-12)


def test_size_and_strides_do_not_matter() -> None:
    x = draw((6, 10), torch.float64, seed=2)
    truth = expected(x)
    wide = torch.empty(10, 12, dtype=torch.float64)
    wide[:, ::2] = x.T
    for same in (x * 1e30, wide[:, ::2].T, x.T.contiguous().T):
        np.testing.assert_allclose(orthogonalize(same).numpy(), truth, atol=1e-12)


def test_zero_and_nothing_stay() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert orthogonalize(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert orthogonalize(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only matrices .* \(3,\)"):
        orthogonalize(torch.zeros(3))
