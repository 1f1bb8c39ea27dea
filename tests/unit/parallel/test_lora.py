"""The dropout of adapters: how much, scaled by what, and the same for any part of the tokens and of the inputs."""

import pytest
import torch

from megatrain.nn.contract import Role, Weight
from megatrain.parallel.lora import Adapter, adapter_weights, shard_inputs
from megatrain.parallel.lora_config import LoRAConfig

ROWS, SEQ, IN = 3, 50, 40


def adapter(dropout: float = 0.25, key: int = 7, in_size: int = IN) -> Adapter:
    """One whose output is the sum of its inputs, as they are after dropout, in its first element."""
    weights = adapter_weights(Weight((8, in_size), Role.ROW, unit=4), 2)
    made = Adapter(*weights.values(), LoRAConfig(rank=2, alpha=2.0, dropout=dropout), key)
    return made.to(torch.float64)


def test_dropout() -> None:
    numbers = torch.arange(ROWS * SEQ).view(ROWS, SEQ)
    x = torch.ones(ROWS, SEQ, IN, dtype=torch.float64)
    made = adapter()
    torch.testing.assert_close(
        made._dropped(x), x
    )  # in validation and generation, where tokens have no numbers
    made.token_numbers = numbers
    whole = made._dropped(x)
    kept = whole != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(whole[kept], torch.full_like(whole[kept], 1 / 0.75))
    other = adapter(key=8)
    other.token_numbers = numbers
    assert ((other._dropped(x) != 0) != kept).double().mean() > 0.3

    made.token_numbers = numbers[1:2, 10:20]
    torch.testing.assert_close(made._dropped(x[1:2, 10:20]), whole[1:2, 10:20])
    shard_inputs(made, adapter_weights(Weight((8, IN), Role.ROW, unit=4), 2)["adapter.down"], 3, 1)
    torch.testing.assert_close(
        made._dropped(x[1:2, 10:20, 16:28]), whole[1:2, 10:20, 16:28]
    )  # 10 heads: 4, 3, 3


def test_it_starts_at_no_change_and_scales() -> None:
    made = adapter(dropout=0.0)
    x = torch.randn(2, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x @ made.down.weight.T @ made.up.weight.T * 1.0
    torch.testing.assert_close(made(x), expected)
