"""The micro-batch that `auto` takes: legal in every layout, and what fits by an estimate worked out by hand here."""

from dataclasses import replace

import pytest

from megatrain.models.flops import n_params
from megatrain.models.gpt2.config import GPT2Config
from megatrain.optim.config import AdamWConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.auto import resolve_auto
from megatrain.train.config import Config, TrainConfig
from megatrain.train.micro_batch import (
    activation_bytes,
    largest_fitting,
    micro_batch_choices,
    state_bytes,
)

GPT2 = GPT2Config(n_layers=12, hidden_size=768, n_heads=12, ffn_size=3072)
ALONE = ParallelConfig()
ADAMW = AdamWConfig()
HUGE = 1 << 50


def test_one_stage_may_compute_any_divisor_at_once() -> None:
    assert micro_batch_choices(ALONE, 12) == [12, 6, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("schedule", "rows", "best"),
    [
        ("1f1b", 64, 4),
        ("1f1b", 8, 1),
        ("1f1b", 2, 1),
        ("gpipe", 16, 1),
        ("zbv", 12, 1),
        ("dualpipe_v", 64, 4),
    ],
)
def test_a_pipeline_gets_four_micro_batches_a_rank_where_there_are_rows(
    schedule: str, rows: int, best: int
) -> None:
    layout = ParallelConfig(pp=4, pp_schedule=schedule)  # type: ignore[arg-type]
    assert max(micro_batch_choices(layout, rows)) == best


def test_estimates() -> None:
    """GPT-2: 16 bytes a weight in float32, 18 under bf16; per token and layer 12 h of linear inputs and outputs."""
    parameters = n_params(GPT2)
    assert state_bytes(GPT2, ALONE, ADAMW, precision="fp32") == 16 * parameters
    assert state_bytes(GPT2, ALONE, ADAMW, precision="bf16") == 18 * parameters
    sharded = ParallelConfig(dp_shard=4)
    assert state_bytes(GPT2, sharded, ADAMW, precision="bf16") == 18 * parameters / 4
    assert (
        state_bytes(GPT2, replace(sharded, zero_stage=1), ADAMW, precision="bf16")
        == (12 / 4 + 6) * parameters
    )
    # Under fp8 a byte for each code of the blocks' matrices and of their transposes, where a step keeps them.
    codes = 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert state_bytes(GPT2, ALONE, ADAMW, precision="fp8") == 18 * parameters + codes
    assert state_bytes(GPT2, sharded, ADAMW, precision="fp8") == 18 * parameters / 4
    # queries, keys, values, attention's output; inputs of norm, projections, norm, MLP; up and activation
    per_layer = 4 * 768 + 4 * 768 + 2 * 3072
    assert activation_bytes(GPT2, ALONE, 1024, precision="bf16") == (12 * per_layer + 4 * 768) * 2 * 1024
    full = replace(ALONE, activation_checkpointing="full")
    assert activation_bytes(GPT2, full, 1024, precision="bf16") == (12 * 768 + per_layer + 4 * 768) * 2 * 1024
    # tensor parallelism keeps the inputs of the projections, of the MLP and of the head whole, which it gathers
    cut = (12 * (4 * 768 + 2 * 768 + 2 * 3072) + 768) / 2 + 12 * 2 * 768 + 3 * 768
    halves = activation_bytes(GPT2, ParallelConfig(tp=2, cp=2), 1024, precision="bf16")
    assert halves == cut * 2 * 1024 / 2


def test_the_largest_that_fits_is_taken() -> None:
    sequence = activation_bytes(GPT2, ALONE, 1024, precision="bf16")
    state = state_bytes(GPT2, ALONE, ADAMW, precision="bf16")
    for room, expected in ((0, 1), (1.5, 1), (4.1, 4), (7.9, 4), (8.1, 8), (1e9, 64)):
        memory = int((state + room * sequence) / 0.8)
        found = largest_fitting(
            [64, 8, 4, 1], GPT2, ALONE, 1024, optim=ADAMW, precision="bf16", memory=memory
        )
        assert found == expected
    assert (
        largest_fitting([512, 64], GPT2, ALONE, 1024, optim=ADAMW, precision="bf16", memory=HUGE) == 64
    )  # 65,536 tokens


def test_a_resumed_run_keeps_its_micro_batch_where_it_can() -> None:
    cfg = Config(train=TrainConfig(precision="fp32"))  # 16 sequences
    assert resolve_auto(cfg, memory=HUGE).micro_batch_size == 16
    before = replace(cfg, micro_batch_size=2)
    assert resolve_auto(cfg, memory=HUGE, before=before).micro_batch_size == 2
    wide = replace(cfg, parallel=ParallelConfig(dp_shard=16))
    assert resolve_auto(wide, memory=HUGE, before=before).micro_batch_size == 1
    assert resolve_auto(replace(cfg, micro_batch_size=8), memory=HUGE, before=before).micro_batch_size == 8
    tensor = replace(cfg, train=TrainConfig(precision="fp8", fp8_scaling="tensor"))
    assert resolve_auto(tensor, memory=0, before=before).micro_batch_size == 2


def test_unresolved_is_an_error() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        _ = Config().resolved_micro_batch_size
