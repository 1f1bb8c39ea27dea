"""Counter-based random numbers: against Python integers, as parts and as a whole, and their statistics."""

import math

import numpy as np
import pytest
import torch

from megatrain.runtime.rng import CHUNK, fill_normal_, random_bits, stream_key

MASK = (1 << 64) - 1
NAME = "layers.0.attn.wq.weight"


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def draw(*shape: int, seed: int = 0, name: str = NAME, std: float = 1.0) -> torch.Tensor:
    out = torch.empty(shape)
    fill_normal_(out, seed=seed, name=name, std=std, shape=shape, offsets=(0,) * len(shape))
    return out


@pytest.mark.parametrize("key", [0, 1234567, -5, stream_key(0, NAME)])
def test_bits_are_splitmix64(key: int) -> None:
    got = random_bits(torch.arange(100), key).numpy().astype(np.uint64)
    assert got.tolist() == splitmix64(key & MASK, 100)


def test_normal_values_are_the_box_muller_transform_of_the_bits() -> None:
    expected = []
    for bits in splitmix64(stream_key(7, "x") & MASK, 500):
        share, angle = ((bits >> 32) + 0.5) / 2**32, 2 * math.pi * (bits & 0xFFFFFFFF) / 2**32
        expected.append(0.02 * math.sqrt(-2 * math.log(share)) * math.cos(angle))
    # Half a unit in float32's last place.
    assert draw(500, seed=7, name="x", std=0.02).tolist() == pytest.approx(expected, rel=6e-8)


def test_first_values_are_frozen() -> None:
    """A config and a seed mean the same weights in every later version (and on every kind of processor)."""
    assert draw(3).tolist() == [0.7197422385215759, 0.789100706577301, -1.556288480758667]


SHARDS = [
    (64, 48, 0, 0),
    (16, 48, 0, 0),
    (1, 48, 63, 0),
    (64, 24, 0, 7),
    (1, 1, 63, 0),
    (11, 5, 40, 43),
    (0, 48, 0, 0),
]


@pytest.mark.parametrize(("rows", "columns", "row", "column"), SHARDS)
def test_a_shard_equals_its_part_of_the_whole(rows: int, columns: int, row: int, column: int) -> None:
    part = torch.empty(rows, columns)
    fill_normal_(part, seed=0, name=NAME, std=1.0, shape=(64, 48), offsets=(row, column))
    assert torch.equal(part, draw(64, 48)[row : row + rows, column : column + columns])


def test_shards_of_any_number_of_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(6, 5, 7)
    assert torch.equal(whole.flatten(), draw(6 * 5 * 7))
    monkeypatch.setitem(CHUNK, "cpu", 13)  # many chunks, of one row each
    part = torch.empty(7, 3, 4).permute(2, 1, 0)  # neither contiguous nor at the beginning
    fill_normal_(part, seed=0, name=NAME, std=1.0, shape=(6, 5, 7), offsets=(2, 2, 0))
    assert torch.equal(part, whole[2:, 2:, :])


def test_a_part_of_a_large_tensor_needs_no_large_tensor() -> None:
    """The last rows of a tensor of 2^41 elements, whose numbers do not fit 32 bits."""
    part = torch.empty(2, 3)
    fill_normal_(part, seed=0, name="x", std=1.0, shape=(1 << 21, 1 << 20), offsets=((1 << 21) - 2, 5))
    key, numbers = (
        stream_key(0, "x"),
        [((1 << 21) - 2 + i) * (1 << 20) + 5 + j for i in (0, 1) for j in range(3)],
    )
    bits = [splitmix64((key + number * 0x9E3779B97F4A7C15) & MASK, 1)[0] for number in numbers]
    signs = [math.cos(2 * math.pi * (each & 0xFFFFFFFF) / 2**32) > 0 for each in bits]
    assert (part > 0).flatten().tolist() == signs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_type_gets_float32_values(dtype: torch.dtype) -> None:
    """So a float64 run begins where the float32 run begins."""
    out = torch.empty(1000, dtype=dtype)
    fill_normal_(out, seed=0, name=NAME, std=0.02, shape=(1000,), offsets=(0,))
    assert torch.equal(out, draw(1000, std=0.02).to(dtype))


def test_values_are_normal() -> None:
    n = 1 << 20
    values = draw(n).double()
    # Five standard errors of each moment's estimate; the distribution function by Kolmogorov's bound at 1e-6.
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(values.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    below = 0.5 * (1 + torch.erf(values.sort().values / math.sqrt(2)))
    assert (below - torch.arange(n) / n).abs().max() < math.sqrt(-0.5 * math.log(0.5e-6) / n) + 1 / n


@pytest.mark.parametrize("lag", [1, 2, 3, 256, 1024])
def test_neighbours_are_unrelated(lag: int) -> None:
    values = draw(1 << 20).double()
    for power in (values, values.square() - 1):
        product = power[lag:] * power[:-lag]
        assert abs(product.mean()) < 5 * product.std() / math.sqrt(product.numel())


def test_seeds_and_names_are_unrelated() -> None:
    n = 1 << 18
    streams = [
        (0, "a"),
        (1, "a"),
        (2, "a"),
        (0, "b"),
        (0, "layers.1.mlp.up.weight"),
        (0, "layers.2.mlp.up.weight"),
    ]
    values = torch.stack([draw(n, seed=seed, name=name) for seed, name in streams])
    correlation = torch.corrcoef(values) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(n)
