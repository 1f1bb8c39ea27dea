"""Initial weights: shard by shard the same, with the promised statistics."""

import math

import numpy as np
import pytest
import torch

from megatrain.models.decoder import Decoder
from megatrain.nn.config import DecoderConfig
from megatrain.nn.init import init_parameter_, init_weights
from megatrain.runtime.rng import fill_normal_, random_bits, stream_key

CFG = DecoderConfig(n_layers=8, hidden_size=64, n_heads=4, ffn_size=96, vocab_size=128, init_std=0.02)
WQ = "layers.0.attn.wq.weight"


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    mask, out = (1 << 64) - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("key", [0, 1234567, -5, stream_key(0, WQ)])
def test_bits_are_splitmix64(key: int) -> None:
    got = random_bits(torch.arange(100), key).numpy().astype(np.uint64)
    assert got.tolist() == splitmix64(key & ((1 << 64) - 1), 100)


def test_a_shard_equals_its_part_of_the_whole() -> None:
    whole = torch.empty(64, 48)
    init_parameter_(whole, WQ, CFG, seed=3)
    indices = torch.arange(64 * 48).view(64, 48)
    for rows, columns in (
        (slice(0, 16), slice(None)),
        (slice(None), slice(7, 31)),
        (slice(63, 64), slice(0, 1)),
    ):
        part = torch.empty(whole[rows, columns].shape)
        init_parameter_(part, WQ, CFG, seed=3, indices=indices[rows, columns].contiguous())
        assert torch.equal(part, whole[rows, columns])


def test_values_are_normal_and_streams_are_unrelated() -> None:
    n = 1 << 20
    draws = []
    for seed, name in ((0, "a"), (1, "a"), (0, "b")):
        out = torch.empty(n, dtype=torch.float64)
        fill_normal_(out, seed=seed, name=name, std=2.0)
        draws.append(out)
        # Five standard errors of each moment's estimate.
        assert abs(out.mean()) < 5 * 2 / math.sqrt(n)
        assert abs(out.std() / 2 - 1) < 5 / math.sqrt(2 * n)
        assert abs((out / 2).pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
        assert abs((out[1:] * out[:-1]).mean() / 4) < 5 / math.sqrt(n)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((draws[one] * draws[other]).mean() / 4) < 5 / math.sqrt(n)


def test_first_values_are_frozen() -> None:
    out = torch.empty(3)
    fill_normal_(out, seed=0, name=WQ, std=1.0)
    assert out.tolist() == pytest.approx([-0.8474783, -1.563622, 0.4260369], rel=1e-6)


def test_roles() -> None:
    model = Decoder(CFG)
    init_weights(model, CFG, seed=0)
    weights = dict(model.named_parameters())
    assert torch.equal(weights["norm.weight"], torch.ones(64))
    assert weights[WQ].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["layers.0.attn.wo.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert weights["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.1)
