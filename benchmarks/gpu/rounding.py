"""How far rounding may put an element off, by what went into it.

Whatever the tensor's largest number is, an element of it is the sum of some terms. A kernel that computes in float32
and keeps what it must in the inputs' type makes three kinds of errors in it, and no others:

- the result is stored in the inputs' type: `u` of its size;
- terms are rounded to the inputs' type before they are multiplied (attention's probabilities): `u` of each term.
  Together at most the sum of the terms' sizes; if they are many, and rounded up and down by chance, `SPREAD` times the
  root of the sum of their squares, which is far less (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, A2815);
- all else is float32: `e` of the sum of the terms' sizes.

The bound is per element, so a scale that is wrong by 2 % exceeds it, and so does one key too many for one query; a
bound of some per cent of the tensor's largest element sees neither.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPREAD = 4.0
"""Roots of a sum of squares. A rounding error is at most u and about 0.4 u on average, so this is ten standard
deviations: a right kernel exceeds it in no tensor that fits a GPU."""
FLOAT32_ROUNDINGS = 64
"""How many roundings of float32 an element may see inside: products in three parts of tf32, exponentials by hardware,
and sums over thousands of terms in blocks."""
FEWEST = 2.0**-126
"""Least normal float32 and bf16: below it devices round to zero."""


class Rounding(NamedTuple):
    """What one rounding is, as a part of what is rounded."""

    u: float
    """Of the type that inputs and results have."""
    e: float
    """Of what is computed in float32."""
    by_chance: bool
    """Whether many terms may count by the root of their squares."""

    def of_terms(self, size: Tensor, squares: Tensor) -> Tensor:
        """Return the rounding of a sum's terms, over u.

        size: the sum of their sizes. squares: the sum of their squares.
        """
        return torch.minimum(size, SPREAD * squares.sqrt()) if self.by_chance else size


def rounding(dtype: torch.dtype, *, widened: bool = True) -> Rounding:
    """Return the roundings of a kernel that reads and writes `dtype`.

    Args:
        widened: it computes in float32. PyTorch's paths for training on a CPU do not: they round each step to `dtype`.
    """
    float32 = FLOAT32_ROUNDINGS * 2.0**-24
    if dtype == torch.float32:
        return Rounding(float32, float32, by_chance=False)
    u = torch.finfo(dtype).eps / 2
    return Rounding(u, float32, by_chance=True) if widened else Rounding(u, 4 * u, by_chance=False)


def excess(got: Tensor, truth: Tensor, allowed: Tensor) -> float:
    """Return the largest deviation of an element, in what is allowed for it; NaN counts as infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != truth.shape:
        raise ValueError(f"shape {tuple(got.shape)}: must be {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    off = (got - truth).abs().masked_fill(got == truth, 0.0)  # equal infinities too
    ratio = off / (allowed + FEWEST)
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
