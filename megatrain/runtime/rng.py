"""Random numbers as a function of a counter: element i of a stream, whatever was drawn before it or beside it.

The bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the counter, keyed by a seed and a name. Normal
values come from the Box-Muller transform in float64 and are rounded to float32, which hides the last-digit
differences of logarithm and cosine between devices.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 17}
"""Elements made at a time: on a CPU the float64 scratch stays in its cache (7 times faster than 2^20 there)."""
LARGE_CHUNK = 1 << 24

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(seed: int, name: str) -> int:
    """Return a signed 64-bit key of the stream `name` under `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def random_bits(counters: Tensor, key: int) -> Tensor:
    """Return SplitMix64's outputs number `counters` (int64, any shape) of the stream `key`, as int64."""
    z = (counters + 1).mul_(GOLDEN).add_(key)  # int64 arithmetic wraps, as SplitMix64 wants
    z.bitwise_xor_(_shift_right(z, 30)).mul_(MIX_1)
    z.bitwise_xor_(_shift_right(z, 27)).mul_(MIX_2)
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift signed integers logically."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def normal(counters: Tensor, key: int) -> Tensor:
    """Return standard normal float64 values, one a counter, within ±6.8 (the ends of 32 bits)."""
    bits = random_bits(counters, key)
    angle = (bits & 0xFFFFFFFF).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    share = _shift_right(bits, 32).to(torch.float64).add_(0.5).mul_(2.0**-32)  # inside (0, 1)
    return share.log_().mul_(-2.0).sqrt_().mul_(angle.cos_())


def keeps(counters: Tensor, key: int, dropout: float) -> Tensor:
    """Return whether dropout leaves the elements number `counters` of the stream `key`, each with 1 - `dropout`."""
    return _shift_right(random_bits(counters, key), 33) >= int(dropout * (1 << 31))


def fill_normal_(
    out: Tensor, *, seed: int, name: str, std: float, shape: Sequence[int], offsets: Sequence[int]
) -> None:
    """Fill `out` with its part of a tensor of normal values with standard deviation `std`.

    The whole has `shape`, `out` begins at `offsets` in it; element i of the whole, counted row by row, is number i
    of the stream `name`. The values are float32's whatever `out`'s type. Nothing larger than a chunk is made.
    """
    key = stream_key(seed, name)
    rows = max(1, CHUNK.get(out.device.type, LARGE_CHUNK) // max(1, math.prod(out.shape[1:])))
    for start in range(0, out.shape[0], rows):
        part = out[start : start + rows]
        counters = _element_numbers(part, shape, (offsets[0] + start, *offsets[1:]))
        part.copy_(normal(counters, key).mul_(std).to(torch.float32))


def _element_numbers(part: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """Return the row-major number, in a tensor of `shape`, of each element of `part`, which begins at `offsets`."""
    numbers = torch.zeros((), dtype=torch.int64, device=part.device)
    for size, full_size, offset in zip(part.shape, shape, offsets, strict=True):
        place = torch.arange(offset, offset + size, device=part.device)
        numbers = numbers.unsqueeze(-1) * full_size + place
    return numbers
