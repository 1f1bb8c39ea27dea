"""Rotary positions: frequencies (stretched on request), and the angles of a batch."""

import math

import torch
from torch import Tensor

from megatrain.nn.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[list[float], float]:
    """`head_dim / 2` angles a token, and the factor on cos and sin (1 but for YaRN)."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain], 1.0
    if scaling.kind == "llama3":
        return [_llama3(f, scaling) for f in plain], 1.0
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn(plain, theta, scaling), factor


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """Long wavelengths are stretched, short ones kept, with a ramp between (Llama 3.1's published code)."""
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _yarn(plain: list[float], theta: float, scaling: RopeScaling) -> list[float]:
    """YaRN's ramp over the dimensions (arXiv 2309.00071, section 3.2)."""
    half = len(plain)

    def dimension(turns: float) -> float:
        """Where the dimension lies that turns this often over the original length."""
        return half * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), 2 * half - 1)
    stretched = [min(1.0, max(0.0, (i - low) / max(high - low, 0.001))) for i in range(half)]
    return [f / scaling.factor * s + f * (1 - s) for f, s in zip(plain, stretched, strict=True)]


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """cos and sin `(..., head_dim / 2)`, float32, of `positions` `(...)`."""
    frequencies, factor = rope_frequencies(head_dim, theta, scaling)
    inverse = torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * inverse
    return angles.cos() * factor, angles.sin() * factor
