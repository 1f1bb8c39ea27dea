"""The order of samples: a bijection for every size, different each epoch, fair, and in constant memory."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.order import ROUNDS, keys_of, mix64, permute, sample_ids

SIZES = sorted(
    {1, 2, 3, 4, 5, 6, 7, 11, 97, 1009, 65537}  # primes among them
    | {2**k + d for k in (3, 7, 10, 15) for d in (-1, 0, 1)}
)


def splitmix64_outputs(count: int) -> list[int]:
    """The published generator with seed 0, in Python's own integers."""
    outputs, mask = [], 2**64 - 1
    state = 0
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_mix64_is_the_published_function() -> None:
    # First output of SplitMix64 with seed 0, as printed by many implementations.
    assert splitmix64_outputs(1) == [0xE220A8397B1DCDAF]
    states = np.array([(i * 0x9E3779B97F4A7C15) % 2**64 for i in range(1, 101)], dtype=np.uint64)
    assert mix64(states).tolist() == splitmix64_outputs(100)


@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_visits_every_sample_once(n: int) -> None:
    epochs = [sample_ids(e * n, n, n=n, seed=3, fingerprint="f").tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 10:  # tiny n have few orders, so equal ones are no fault
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_bijective_for_any_size(n: int, seed: int, epoch: int) -> None:
    ids = sample_ids(epoch * n, n, n=n, seed=seed, fingerprint="f")
    assert np.array_equal(np.sort(ids), np.arange(n))


def test_seed_and_fingerprint_choose_the_order() -> None:
    def first(seed: int, fingerprint: str) -> tuple[int, ...]:
        return tuple(sample_ids(0, 50, n=1000, seed=seed, fingerprint=fingerprint).tolist())

    assert len({first(0, "a"), first(1, "a"), first(0, "b"), first(1, "b")}) == 4


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(n=st.integers(1, 40), start=st.integers(0, 200), count=st.integers(0, 100))
def test_a_slice_does_not_depend_on_where_it_is_cut(n: int, start: int, count: int) -> None:
    whole = sample_ids(0, start + count, n=n, seed=1, fingerprint="f")
    assert np.array_equal(sample_ids(start, count, n=n, seed=1, fingerprint="f"), whole[start:])


@pytest.mark.parametrize("n", [3, 5])
def test_all_orders_of_a_tiny_set_are_equally_likely(n: int) -> None:
    draws = 6_000
    index = np.arange(n)
    seen = Counter(tuple(permute(index, n, keys=keys_of(s, count=ROUNDS)).tolist()) for s in range(draws))
    orders = math.factorial(n)
    chi_square = sum(
        (seen[p] - draws / orders) ** 2 / (draws / orders) for p in itertools.permutations(range(n))
    )
    # Chi-square has mean d and variance 2d for d = orders - 1; 5 sigma.
    assert chi_square < (orders - 1) + 5 * math.sqrt(2 * (orders - 1))


def test_places_are_uniform_and_neighbours_independent() -> None:
    n, bins = 10_007, 16
    order = sample_ids(0, n, n=n, seed=0, fingerprint="f")
    table, _, _ = np.histogram2d(order[:-1] * bins // n, order[1:] * bins // n, bins=bins)
    expected = (n - 1) / bins**2
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert abs(chi_square - (bins**2 - 1)) < 5 * math.sqrt(2 * (bins**2 - 1))


def test_a_trillion_samples_need_no_memory() -> None:
    n = 10**12
    tracemalloc.start()
    ids = sample_ids(7 * n - 500, 1000, n=n, seed=0, fingerprint="f")  # across an epoch's end
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert ids.min() >= 0
    assert ids.max() < n
    assert len(set(ids[:500].tolist())) == len(set(ids[500:].tolist())) == 500
    assert ids.max() > 0.9 * n  # spread over all of it: of 1,000, none in the last tenth has odds of 1e-46


def test_the_order_never_changes() -> None:
    # A run that is resumed with a later version must see the same order: these are the values of the first.
    assert sample_ids(0, 8, n=1000, seed=0, fingerprint="f").tolist() == GOLDEN_SMALL
    assert sample_ids(10**12, 4, n=10**12, seed=5, fingerprint="f").tolist() == GOLDEN_LARGE


GOLDEN_SMALL = [164, 930, 908, 223, 490, 44, 555, 558]
GOLDEN_LARGE = [163546943107, 291235737032, 773966257208, 564113128317]
