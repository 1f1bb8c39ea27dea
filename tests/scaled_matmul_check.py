"""Scaled products against float64: each value times the scale of its tile, summed."""

from dataclasses import dataclass

import numpy as np
import torch
from quantization_check import as_numbers, draw, tiles
from torch import Tensor

from megatrain_kernels import quantize

FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
PAIRS = {
    "tensor": ("tensor", "tensor"),
    "row": ("row", "row"),
    "block": ("group", "block"),
    "groups": ("group", "group"),
    "blocks": ("block", "block"),
    "mixed": ("row", "group"),
    "a tensor, b blocks": ("tensor", "block"),
}
"""Scalings of a and of the transpose of b."""
SHAPES = [(20, 70, 35), (1, 64, 33), (65, 32, 16), (40, 130, 70)]
GROUP = 32


@dataclass(frozen=True)
class Operand:
    """A matrix `(rows, k)` in fp8."""

    values: Tensor
    scales: Tensor
    truth: np.ndarray
    """float64."""


def operand(rows: int, k: int, dtype: str, scaling: str, seed: int = 0) -> Operand:
    values, scales = quantize(draw(rows, k, seed=seed), dtype=dtype, scaling=scaling, group_size=GROUP)
    each = scales.double().flatten().numpy()[tiles((rows, k), scaling, GROUP)]
    return Operand(values, scales, as_numbers(values, dtype) * each)


def error(got: Tensor, a: Operand, b: Operand) -> float:
    """The largest, relative to what an element's sum of sizes is: no rounding of sums can be larger than that."""
    truth, sizes = a.truth @ b.truth.T, np.abs(a.truth) @ np.abs(b.truth).T
    assert got.shape == truth.shape
    return float((np.abs(got.double().numpy() - truth) / np.maximum(sizes, 1e-300)).max())  # of zeros it is 0


def turned(scales: Tensor) -> Tensor:
    return scales.mT if scales.ndim == 2 else scales
