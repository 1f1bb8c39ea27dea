"""Random numbers as a function of a counter: element i of a stream, whatever was drawn before it or beside it.

The bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the counter, keyed by a seed and a name; normal
values come from the Box-Muller transform in float64, so that rounding to float32 hides the last-digit differences
of logarithm and cosine between devices.
"""

import hashlib
import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements made at a time: bounds the float64 scratch memory

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(seed: int, name: str) -> int:
    """A signed 64-bit key of the stream `name` under `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def random_bits(counters: Tensor, key: int) -> Tensor:
    """SplitMix64's output number `counters` (int64, any shape) of the stream `key`, as int64."""
    z = (counters + 1) * GOLDEN + key  # int64 arithmetic wraps, as SplitMix64 wants
    z = (z ^ _shift_right(z, 30)) * MIX_1
    z = (z ^ _shift_right(z, 27)) * MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of signed integers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(counters: Tensor, key: int) -> Tensor:
    """Float64 values in (0, 1), one a counter: 53 random bits and a half."""
    return (_shift_right(random_bits(counters, key), 11).to(torch.float64) + 0.5) * 2.0**-53


def normal(counters: Tensor, key: int) -> Tensor:
    """Standard normal float64 values, one a counter; each uses two outputs of the stream."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(2 * counters, key)))
    return radius * torch.cos(2.0 * math.pi * uniform(2 * counters + 1, key))


def fill_normal_(out: Tensor, *, seed: int, name: str, std: float, indices: Tensor | None = None) -> None:
    """Fill `out` with normal values of standard deviation `std`: element i is number i of the stream `name`.

    `indices` (int64, as many as `out` has elements) are the elements' global indices when `out` is a part of a
    larger tensor; None: `out` is the whole.
    """
    key = stream_key(seed, name)
    flat = out.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        if indices is None:
            counters = torch.arange(start, start + part.numel(), device=out.device)
        else:
            counters = indices.view(-1)[start : start + CHUNK]
        part.copy_(normal(counters, key).mul_(std))
