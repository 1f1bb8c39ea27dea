"""The symmetric products of Newton-Schulz as Triton kernels, against float64; blocks are 16 wide."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain_kernels import orthogonalize

TOLERANCE = 1e-5
"""Relative to the largest entry: float32 sums of up to some hundred products."""


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return ((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def product_error(module: Any, x: Tensor, **options: float) -> float:
    alpha, beta = options.get("alpha", 1.0), options.get("beta", 0.0)
    wide = x.double()
    truth = alpha * wide @ wide.mT + (beta * wide if beta else 0.0)
    return error(module.symmetric_product(x, **options), truth)


def kernels() -> Any:
    return import_module("megatrain_kernels.newton_schulz.triton")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 16), (2, 17, 5), (3, 33, 40), (1, 48, 100)])
def test_gram_matrices(shape: tuple[int, int, int]) -> None:
    assert product_error(kernels(), draw(1, *shape)) < TOLERANCE
    assert product_error(kernels(), draw(2, shape[0], shape[2], shape[1]).mT) < TOLERANCE  # columns first


@pytest.mark.parametrize("size", [1, 16, 17, 40])
def test_polynomials_of_symmetric_matrices(size: int) -> None:
    x = draw(3, 2, size, size)
    assert product_error(kernels(), x + x.mT, alpha=2.0315, beta=-4.775) < TOLERANCE


@settings(max_examples=15)
@given(batch=st.integers(1, 3), rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 1000))
def test_orthogonalization(batch: int, rows: int, cols: int, seed: int) -> None:
    """Against the same polynomial of the singular values, in float64."""
    x = draw(seed, batch, rows, cols)
    made = orthogonalize(x, backend="triton")
    wide = x.double()
    u, s, v = torch.linalg.svd(wide / wide.norm(dim=(-2, -1), keepdim=True), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert error(made, u @ torch.diag_embed(s) @ v) < 1e-4  # small singular values grow 3.4 times a step


BROKEN = [
    ("if right <= down:", "if right < down:"),
    ("if right < down:\n            mirrored", "if right > down:\n            mirrored"),
    ("(k[None, :] < inner)", "(k[None, :] < inner - 1)"),
    ("total = total * alpha", "total = total"),
    ("tl.trans(made)", "made"),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case[1].splitlines()[0])
def test_a_broken_kernel_fails(case: tuple[str, str], tmp_path: Path) -> None:
    import importlib.util

    source = Path(str(kernels().__file__)).read_text()
    assert case[0] in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(*case))
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    assert not product_error(broken, draw(1, 1, 40, 37), alpha=2.0) < TOLERANCE
