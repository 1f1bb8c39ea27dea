"""Arithmetic of layouts: rules with their nearest legal values, stages, balance."""

import itertools
from dataclasses import replace

import pytest
from layouts import EXPERTS

from megatrain.config.errors import UserError
from megatrain.models.mixtral.config import MixtralConfig
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import DecoderConfig, ExpertsConfig
from megatrain.nn.contract import Role, Weight
from megatrain.nn.plan import decoder_plan
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import (
    data_ranks,
    fill,
    needed_heads,
    problems,
    require_processes,
    shards_heads,
    share_of,
    stage_rank,
    world_size,
)
from megatrain.parallel.pipeline import balanced

MODEL = Qwen3Config(n_layers=6, hidden_size=96, n_heads=12, n_kv_heads=4, ffn_size=96, vocab_size=96)


def broken(model: DecoderConfig = MODEL, **layout: object) -> dict[str, tuple[object, ...]]:
    cfg = ParallelConfig(**layout)  # type: ignore[arg-type]
    return {p.field: p.legal for p in problems(cfg, decoder_plan(model), seq_len=48, rows=16, micro_batch=1)}


def test_sizes() -> None:
    cfg = ParallelConfig(pp=2, dp_replicate=3, dp_shard=4, cp=5, tp=2)
    assert world_size(cfg) == 240
    assert data_ranks(cfg) == 12
    assert fill(replace(cfg, dp_shard=-1), 480).dp_shard == 8


@pytest.mark.parametrize(
    ("layout", "field", "legal"),
    [
        ({"tp": 5}, "parallel.tp", (4, 6)),  # 48 tokens
        ({"tp": 16}, "parallel.tp", (12,)),  # 12 heads
        ({"cp": 5}, "parallel.cp", (4, 6)),  # 24 pairs of positions
        ({"cp": 8, "cp_kind": "ulysses"}, "parallel.cp", (2, 4)),
        ({"cp": 2, "tp": 8, "cp_kind": "ulysses"}, "parallel.cp", (1,)),  # a rank has one query head or two
        ({"pp": 8}, "parallel.pp", (6,)),
        ({"pp": 4, "pp_schedule": "interleaved_1f1b"}, "parallel.pp", (3,)),
        ({"pp": 2, "pp_split": (3, 4)}, "parallel.pp_split", ()),
        ({"pp_split": (3,)}, "parallel.pp_split", ((),)),
        ({"pp": 3, "pp_schedule": "dualpipe_v", "zero_stage": 2}, "parallel.pp_schedule", ("1f1b", "gpipe")),
        ({"dp_shard": 2, "ep": 2}, "parallel.ep", (1,)),  # no experts
    ],
)
def test_a_broken_rule_names_the_nearest_legal_values(
    layout: dict[str, object], field: str, legal: tuple[object, ...]
) -> None:
    assert broken(**layout)[field] == legal


def test_legal_layouts_break_nothing() -> None:
    for layout in (
        {},
        {"tp": 4, "cp": 2},
        {"tp": 3},  # 4 key heads
        {"tp": 8},
        {"tp": 8, "cp": 3, "cp_kind": "ring"},
        {"pp": 2, "pp_schedule": "zbv", "zero_stage": 1},
        {"pp": 2, "pp_schedule": "zbv", "tp": 2, "activation_checkpointing": "selective"},
        {"pp": 3, "pp_split": (1, 5)},
    ):
        assert not broken(**layout)  # type: ignore[arg-type]


def test_tensor_parallelism_reaches_every_expert() -> None:
    model = MixtralConfig(
        n_layers=2,
        hidden_size=64,
        n_heads=8,
        n_kv_heads=4,
        ffn_size=96,
        vocab_size=96,
        experts=ExpertsConfig(ffn_size=3),
    )
    assert broken(model, tp=4)["parallel.tp"] == (3,)
    assert not broken(model, tp=4, ep=4)  # whole experts may have any width


@pytest.mark.parametrize(("units", "ranks"), [(12, 8), (50257, 8), (7, 7), (3, 2), (16, 4)])
def test_shares_are_in_order_complete_and_even(units: int, ranks: int) -> None:
    shares = [share_of(units, ranks, rank) for rank in range(ranks)]
    assert [unit for share in shares for unit in share] == list(range(units))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) == (units % ranks != 0)


@pytest.mark.parametrize(
    ("queries", "keys", "ranks"), [(16, 2, 8), (6, 2, 4), (12, 4, 3), (12, 4, 5), (8, 1, 4)]
)
def test_a_rank_computes_the_key_heads_that_its_query_heads_need(queries: int, keys: int, ranks: int) -> None:
    weight = Weight((8 * keys, 32), Role.COLUMN, unit=8, serves=queries // keys)
    assert not shards_heads(weight, ranks)
    for rank in range(ranks):
        mine, heads = share_of(queries, ranks, rank), needed_heads(weight, ranks, rank)
        served = len(mine) // len(heads)
        assert len(mine) == served * len(heads)
        assert [heads[n // served] for n in range(len(mine))] == [query // weight.serves for query in mine]


@pytest.mark.parametrize(
    ("layout", "field", "legal"),
    [
        ({"ep": 2}, "parallel.ep", (1,)),  # one rank
        ({"dp_replicate": 4, "ep": 2}, "parallel.ep", (1,)),  # copies have their own experts
        ({"dp_shard": 3, "cp": 2, "tp": 2, "ep": 12}, "parallel.ep", (4, 6)),  # 12 ranks, but 8 experts
        ({"dp_shard": 3, "cp": 2, "tp": 2, "ep": 5}, "parallel.ep", (4, 6)),
        ({"dp_shard": 16, "ep": 16}, "parallel.ep", (4, 8)),
        ({"dp_shard": 2, "ep": 2, "tp": 16}, "parallel.tp", (12,)),  # 12 heads
    ],
)
def test_rules_of_expert_parallelism(
    layout: dict[str, object], field: str, legal: tuple[object, ...]
) -> None:
    moe = ExpertsConfig(n_experts=8, ffn_size=30, n_shared_experts=1)
    assert broken(replace(MODEL, experts=moe), **layout)[field][-2:] == legal


def test_ep_need_not_divide_the_experts() -> None:
    model = replace(MODEL, experts=ExpertsConfig(n_experts=6, ffn_size=30))
    assert not broken(model, dp_shard=4, ep=4)
    assert not broken(model, tp=2, dp_shard=2, ep=4, activation_checkpointing="selective")


def test_ep_is_no_mistake_before_the_processes_are_known() -> None:
    known, unknown = (replace(EXPERTS, parallel=ParallelConfig(dp_shard=n, ep=4, tp=2)) for n in (1, -1))
    assert [problem.field for problem in known.problems()] == ["parallel.ep"]
    assert not list(unknown.problems())


def test_another_number_of_processes_is_refused() -> None:
    require_processes(ParallelConfig(), 1)
    require_processes(ParallelConfig(pp=2, tp=2), 4)
    with pytest.raises(
        UserError, match=r"^3 processes started, but the layout \(dp_shard=2 tp=2\) needs 4\."
    ):
        require_processes(ParallelConfig(dp_shard=2, tp=2), 3)


def test_stages_go_round_or_down_and_up() -> None:
    assert [stage_rank(s, ParallelConfig(pp=2, pp_schedule="interleaved_1f1b")) for s in range(4)] == [
        0,
        1,
        0,
        1,
    ]
    assert [stage_rank(s, ParallelConfig(pp=2, pp_schedule="zbv")) for s in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize("costs", [[1, 1, 1, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6], [1] * 7])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_balance_is_the_best_of_all_cuts(costs: list[float], stages: int) -> None:
    def dearest(firsts: tuple[int, ...]) -> float:
        bounds = (*firsts, len(costs))
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    every = [(0, *cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1)]
    found = tuple(balanced(costs, stages))
    assert found in every
    assert dearest(found) == min(map(dearest, every))
