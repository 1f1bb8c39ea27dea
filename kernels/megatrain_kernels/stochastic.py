"""Stochastic rounding to bfloat16, up or down with probabilities that keep the mean (Gupta et al., arXiv 1502.02551).

The random bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): those of an element are a function of a key, of the
number of the update and of the element's number in the full tensor, so that every layout draws the same.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def splitmix(counters: Tensor, key: Tensor | int) -> Tensor:
    """Return SplitMix64's outputs number `counters` (int64, any shape) of the stream `key`, as int64."""
    z = (counters + 1) * GOLDEN + key  # int64 arithmetic wraps, as SplitMix64 wants
    z = (z ^ _shifted(z, 30)) * MIX_1
    z = (z ^ _shifted(z, 27)) * MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift signed integers to the right, logically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def element_bits(elements: Tensor, key: int, step: Tensor) -> Tensor:
    """Return 64 bits for each of `elements`, the int64 numbers of elements in the full tensor, in update `step`."""
    return splitmix(elements, splitmix(step.to(torch.int64), key))


def round_to_bfloat16(x: Tensor, bits: Tensor, draw: int) -> Tensor:
    """Round x stochastically by the 16 bits number `draw` (0 to 3) of `bits`; NaN and infinity stay what they are."""
    x = x.float()
    drawn = (bits >> (16 * draw)).bitwise_and_(0xFFFF).to(torch.int32)
    rounded = ((x.view(torch.int32) + drawn) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
