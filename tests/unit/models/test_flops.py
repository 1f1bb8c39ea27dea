"""The closed form of a step's FLOPs against torch's counter, which watches the operations as they run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatrain.models.decoder import Decoder
from megatrain.models.flops import attention_pairs, flops_per_token
from megatrain.nn.config import DecoderConfig

CONFIGS = {
    "gated, grouped heads": DecoderConfig(
        n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=64
    ),
    "plain, untied, wide heads": DecoderConfig(
        n_layers=1, hidden_size=32, n_heads=2, head_dim=24, ffn_size=64, vocab_size=96, activation="gelu",
        tie_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_counter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = CONFIGS[name]
    # The definition multiplies every query with every key, so the counter sees the full convention.
    monkeypatch.setattr("megatrain.nn.attention.attention", attention_by_definition)
    monkeypatch.setattr("megatrain.nn.loss.linear_cross_entropy", loss_by_definition)
    model = Decoder(cfg)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    assert counter.get_total_flops() == flops_per_token(cfg, 16, causal=False) * tokens.numel()


def attention_by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), -1)
    return (scores @ v.transpose(1, 2)).transpose(1, 2)


def loss_by_definition(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **_: object
) -> torch.Tensor:
    return torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(("seq", "window"), [(1, None), (7, None), (7, 3), (7, 9), (10, 1)])
def test_pairs_by_counting(seq: int, window: int | None) -> None:
    counted = sum(1 for i in range(seq) for j in range(i + 1) if window is None or i - j < window)
    assert attention_pairs(seq, causal=True, window=window) == counted
