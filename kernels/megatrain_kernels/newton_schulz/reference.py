"""The quintic Newton-Schulz iteration of Muon, written out."""

from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of p(s) = a·s + b·s³ + c·s⁵ (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon): the slope at 0 is as steep as it can be, so that five steps bring singular values
from 0.01 to 1 into about 0.7 to 1.2; they do not converge to 1."""
EPS = 1e-7
"""Least norm that is divided by, as in that publication."""


def newton_schulz_reference(x: Tensor, steps: int = 5) -> Tensor:
    """Pass each matrix's singular values, over its Frobenius norm, `steps` times through p; x is `(..., rows, cols)`.

    The singular vectors stay, so the result is near the orthogonal factor of x's polar decomposition. Computed in
    x's own type.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
