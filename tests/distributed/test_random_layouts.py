"""Layouts drawn at random, of runs drawn at random: what nobody thought of. `make sweep` runs many."""

import os
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from layouts import RUNS, in_layout, single
from test_parity import BOUND, check

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.workers import WorkerPool

MOST_PROCESSES = 8
EXAMPLES = int(os.environ.get("SWEEP_EXAMPLES", "30"))
HINTS = get_type_hints(ParallelConfig)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A run and a legal layout of it on 2 to `MOST_PROCESSES` processes."""
    name = draw(st.sampled_from(sorted(RUNS)))
    degrees = st.sampled_from([1, 1, 2, 2, 4])
    axes = [axis for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep") if axis in HINTS]
    layout: dict[str, Any] = {axis: draw(degrees) for axis in axes}
    layout["zero_stage"] = draw(st.integers(0, 3))
    for choice in ("pp_schedule", "cp_kind", "activation_checkpointing"):
        layout[choice] = draw(st.sampled_from(get_args(HINTS[choice])))
    return name, layout


def is_legal(case: tuple[str, dict[str, Any]]) -> bool:
    name, layout = case
    cfg = replace(RUNS[name], parallel=ParallelConfig(**layout))
    return 1 < world_size(cfg.parallel) <= MOST_PROCESSES and not list(cfg.problems())


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # a smaller layout would be another one
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    print_blob=True,
)
@given(case=cases().filter(is_legal))
def test_any_layout_computes_what_one_process_does(
    workers: WorkerPool, case: tuple[str, dict[str, Any]]
) -> None:
    name, layout = case
    defaults = {field.name: field.default for field in fields(ParallelConfig)}
    changed = {key: value for key, value in layout.items() if value != defaults[key]}
    event(f"{world_size(ParallelConfig(**layout))} processes")
    print(name, changed, flush=True)
    check(in_layout(workers, name, layout), single(name), BOUND)
