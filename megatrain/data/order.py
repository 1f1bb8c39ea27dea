"""The order of samples: sample k of a run is a pure function of (seed, data fingerprint, k), in O(1) memory.

Epoch e of a data set of n samples visits them in the order of a keyed permutation of [0, n). The
permutation is a Feistel network over the smallest power of two that holds n, walked along its cycles until
the value is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). All
arithmetic is on 64-bit integers and the same on every machine.
"""

import hashlib

import numpy as np

# Over 12,000 keys, all n! orders of n = 2..5 are equally frequent (chi-square) from 12 rounds on, and not
# with 8: each round over a tiny domain adds only a bit or two. Large domains need four.
ROUNDS = 16
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers by the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def keys_of(*parts: object, count: int) -> np.ndarray:
    """Derive `count` 64-bit keys `(count,)` from the text of `parts`."""
    text = "\0".join(map(str, parts)).encode()
    return np.frombuffer(hashlib.shake_256(text).digest(8 * count), dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, n: int, *, keys: np.ndarray) -> np.ndarray:
    """Map each `index` `(count,)` in [0, n) by the permutation of [0, n) that `keys` choose; returns int64."""
    if n == 1:
        return np.zeros(len(index), dtype=np.int64)
    bits = max((n - 1).bit_length(), 2)
    value = _feistel(np.asarray(index).astype(np.uint64), bits, keys)
    outside = value >= n
    # The domain is below 2n (4 for n = 2), so each pass brings at least about half of the rest inside.
    while outside.any():
        value[outside] = _feistel(value[outside], bits, keys)
        outside = value >= n
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Apply a bijection of [0, 2**bits): alternately change one half of the bits by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = value & low_mask, value >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (mix64(high + key) & low_mask)
        else:
            high = high ^ (mix64(low + key) & high_mask)
    return (high << low_bits) | low


def sample_ids(start: int, count: int, *, n: int, seed: int, fingerprint: str) -> np.ndarray:
    """Return the ids in [0, n) of samples `start` .. `start + count - 1` of the run, `(count,)` int64."""
    parts = []
    stop = start + count
    while start < stop:
        epoch, offset = divmod(start, n)
        take = min(stop - start, n - offset)
        keys = keys_of("sample order", seed, fingerprint, epoch, count=ROUNDS)
        parts.append(permute(np.arange(offset, offset + take), n, keys=keys))
        start += take
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
