"""Faults that `megatrain verify` plants: each is seen where it can reach, and changes nothing where it can not."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from layouts import EXPERTS, STORE, with_layout

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import layout_summary, world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config
from megatrain.train.faults import FAULTS
from megatrain.train.parity import KINDS, DisagreementError, Trace, merged, trace
from megatrain.train.planting import PLANTS
from megatrain.train.verify import BOUND, compare

CFG = replace(EXPERTS, model=replace(EXPERTS.model, tie_embeddings=True))
"""A run in which every fault can do harm: experts, a tied embedding, documents."""
STEPS = 2  # what is stale after the first step shows in the second one
EQUAL, WEAK = (BOUND,) * 4, (math.inf,) * 4

FIRST: dict[str, dict[str, Any]] = {
    "dropped_gradient_sum": {"dp_shard": 2},
    "dropped_expert_sum": {"dp_shard": 2, "tp": 2, "ep": 2},
    "dropped_scatter_sum": {"tp": 2},
    "dropped_replicated_sum": {"tp": 2},
    "dropped_context_exchange": {"cp": 2, "cp_kind": "ring"},
    "dropped_tied_sum": {"pp": 2},
    "doubled_tokens": {"pp": 2, "pp_schedule": "zbv"},
    "stale_shard": {"pp": 2, "zero_stage": 0},
    "stale_gather": {"dp_replicate": 2},
    "wrong_gather_order": {"cp": 2},
    "wrong_chunk_order": {"cp": 2, "cp_kind": "ulysses"},
    "wrong_stage_order": {"pp": 2, "pp_schedule": "interleaved_1f1b"},
    "wrong_micro_batch_order": {"pp": 2, "pp_schedule": "zbv"},
    "wrong_expert_rank": {"dp_shard": 2, "ep": 2},
    "unscaled_expert": {"tp": 2, "ep": 2},
}
"""A layout for each fault that it can reach: that where this is least obvious."""
BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("dropped_expert_sum", {"dp_shard": 2, "ep": 2}),  # each expert is on one rank
    ("wrong_gather_order", {"cp": 2, "cp_kind": "ring"}),
    ("wrong_stage_order", {"pp": 2}),  # no stage between the first and the last
]
"""Faults with a layout that looks as if they could reach it, but they can't."""
LAYOUTS: list[dict[str, Any]] = [
    {"dp_replicate": 2},
    *({"dp_shard": 2, "zero_stage": stage} for stage in range(4)),
    {"tp": 2},
    *({"cp": 2, "cp_kind": kind} for kind in ("all_gather", "ring", "ulysses")),
    *(
        {"pp": 2, "pp_schedule": schedule, "zero_stage": 2}
        for schedule in ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipe_v")
    ),
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_shard": 2, "tp": 2, "zero_stage": 0},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2, "pp_schedule": "zbv"},
    {"pp": 2, "cp": 2, "cp_kind": "ring"},
    {"cp": 2, "tp": 2, "cp_kind": "ulysses"},
    {"dp_shard": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"tp": 4, "ep": 2},
    {"dp_shard": 4, "ep": 2, "zero_stage": 1},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 4},
    {"pp": 2, "dp_shard": 2, "ep": 2},
]


def in_layout(layout: dict[str, Any]) -> Config:
    return with_layout(CFG, "fp64", layout)


@cache
def alone() -> Trace:
    return trace(in_layout({}), STORE, STEPS)


def with_fault(workers: WorkerPool, layout: dict[str, Any], fault: str) -> list[Trace]:
    cfg = in_layout(layout)
    return workers.run(trace, world_size(cfg.parallel), cfg, STORE, STEPS, fault)


def is_seen(parts: list[Trace]) -> bool:
    try:
        return not compare(merged(parts), alone()).within(EQUAL)
    except DisagreementError:
        return True


def unchecked(parts: list[Trace]) -> Trace:
    """Merge traces without comparing copies."""
    arrays = {
        kind: {name: array for part in reversed(parts) for name, array in getattr(part, kind).items()}
        for kind in KINDS
    }
    return replace(parts[0], **arrays)


def reaches(fault: str, layout: dict[str, Any]) -> bool:
    return FAULTS[fault].reaches(CFG.model, ParallelConfig(**layout))


def label(value: Any) -> str:
    return layout_summary(ParallelConfig(**value), options=True) if isinstance(value, dict) else str(value)


def test_each_fault_can_be_planted() -> None:
    assert list(FAULTS) == list(PLANTS) == list(FIRST)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(workers: WorkerPool, fault: str) -> None:
    """And a checker without bounds, that compares no copies, misses it: so it is the bounds that catch it."""
    assert reaches(fault, FIRST[fault])
    parts = with_fault(workers, FIRST[fault], fault)
    assert is_seen(parts)
    assert compare(unchecked(parts), alone()).within(WEAK)


@pytest.mark.parametrize(("fault", "layout"), BESIDE, ids=label)
def test_a_fault_changes_nothing_where_it_can_not_reach(
    workers: WorkerPool, fault: str, layout: dict[str, Any]
) -> None:
    assert not reaches(fault, layout)
    assert not is_seen(with_fault(workers, layout, fault))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_every_fault_is_seen_exactly_where_it_can_reach(workers: WorkerPool, layout: dict[str, Any]) -> None:
    wrong = []
    for fault in FAULTS:
        if fault.endswith(("expert_sum", "expert_rank")) and layout.get("ep", 1) == 1:
            continue  # nowhere to plant it
        if is_seen(with_fault(workers, layout, fault)) != reaches(fault, layout):
            wrong.append(fault)
    assert not wrong
