"""Where a pipeline is cut: the slowest stage against the mean, by FLOPs counted here from published sizes."""

import pytest

from megatrain.cli.compose import compose
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.pipeline import layer_costs, stage_layers
from megatrain.train.config import Config


def slowest_over_mean(cfg: Config, parallel: ParallelConfig, costs: list[float], head: float) -> float:
    plan = decoder_plan(cfg.model)
    costs = [*costs[:-1], costs[-1] + head]
    stages = [
        sum(costs[layer] for layer in stage_layers(stage, plan, parallel, cfg.seq_len))
        for stage in range(parallel.stages)
    ]
    assert sum(stages) == pytest.approx(sum(costs))  # each layer once
    return max(stages) / (sum(costs) / parallel.stages)


def pairs(seq_len: int, window: int | None) -> int:
    """Query-key pairs of a causal mask, one query after the other."""
    return sum(min(n + 1, window or seq_len) for n in range(seq_len))


def test_deepseek_v3_counts_the_experts_that_a_token_meets() -> None:
    """arXiv 2412.19437, section 4.2: 61 layers, the first three dense; 8 of 256 experts and a shared one."""
    cfg = compose(["model=deepseek_v3_671b", "data=synthetic", "seq_len=4096"])
    hidden, heads = 7168, 128
    attention = hidden * 1536 + 1536 * heads * (128 + 64)  # queries
    attention += hidden * (512 + 64) + 512 * heads * (128 + 128)  # keys and values
    attention += heads * 128 * hidden + heads * (128 + 64 + 128) * pairs(4096, None) / 4096
    dense = attention + 3 * hidden * 18432
    experts = attention + (8 + 1) * 3 * hidden * 2048 + 256 * hidden
    costs = [dense] * 3 + [experts] * 58
    assert slowest_over_mean(cfg, ParallelConfig(pp=16), costs, 129280 * hidden) <= 1.05


@pytest.mark.parametrize("seq_len", [4096, 131072])
def test_long_sequences_make_layers_with_full_attention_expensive(seq_len: int) -> None:
    """Every sixth layer sees all tokens, the others 1,024: at 131,072 it costs five times as much as they."""
    model = Qwen3Config(
        n_layers=34, hidden_size=4096, n_heads=32, n_kv_heads=8, head_dim=128, ffn_size=8192, vocab_size=32768,
        max_seq_len=131072, sliding_window=1024, full_attention_every=6, tie_embeddings=False,
    )  # fmt: skip
    cfg = Config(model=model, seq_len=seq_len)
    matrices = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 8192
    costs = [
        matrices + 32 * 2 * 128 * pairs(seq_len, None if layer % 6 == 5 else 1024) / seq_len
        for layer in range(34)
    ]
    head = 4096 * 32768
    found = layer_costs(decoder_plan(model), seq_len)
    assert found == pytest.approx([*costs[:-1], costs[-1] + head])
    assert slowest_over_mean(cfg, ParallelConfig(pp=4), costs, head) <= 1.1
