"""Rotary positions: frequencies (stretched on request), and the angles of a batch."""

import math

import torch
from torch import Tensor

from megatrain.nn.config import RopeScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, *, device: torch.device | None = None
) -> Tensor:
    """Return the frequency of each pair of dimensions in radians per token, `(head_dim / 2,)` float64.

    All kinds of stretching have the form `f · (kept + (1 - kept) / factor)`; they differ in how much of which
    frequency is kept as it was. Everything is computed on `device`: a copy to it would make the host wait.
    """
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    frequencies = theta ** (-2 * pair / head_dim)
    if scaling is None:
        return frequencies
    if (
        scaling.kind == "llama3"
    ):  # by how often it turns over the original length (Llama 3.1's published code)
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif scaling.kind == "yarn":
        kept = _yarn_kept(pair, head_dim, theta, scaling)
    else:  # position interpolation (arXiv 2306.15595)
        kept = torch.zeros_like(frequencies)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_kept(pair: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return YaRN's ramp over the pairs of dimensions (arXiv 2309.00071, section 3.2)."""

    def pair_with(turns: float) -> float:
        """Return the pair of dimensions that turns this often over the original length."""
        length = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    return 1 - (pair - low) / max(high - low, 0.001)


def rope_magnitude(scaling: RopeScaling | None) -> float:
    """Return the factor on cos and sin: 1 but for YaRN's temperature (arXiv 2309.00071, section 3.4)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.mscale is not None else 0.1 * math.log(scaling.factor) + 1.0


def rope_score_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on attention scores: 1 but for DeepSeek's temperature (see `RopeScaling.mscale`)."""
    if scaling is None or scaling.kind != "yarn" or scaling.mscale is None:
        return 1.0
    return (0.1 * scaling.mscale * math.log(scaling.factor) + 1.0) ** 2


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin `(..., head_dim / 2)`, float32, of `positions` `(...)`."""
    frequencies = rope_frequencies(head_dim, theta, scaling, device=positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies.to(torch.float32)
    magnitude = rope_magnitude(scaling)
    return angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)
