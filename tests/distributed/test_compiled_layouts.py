"""Compiled blocks compute in each layout what one process computes without a compiler, in float64."""

from typing import Any

import pytest
from layouts import in_layout, single
from test_parity import BOUND, check, label

from megatrain.runtime.workers import WorkerPool

CASES: list[tuple[str, dict[str, Any]]] = [
    ("untied", {}),
    ("gpt2", {"tp": 2}),
    ("experts", {"dp_shard": 2, "ep": 2}),
    ("tied", {"pp": 2}),
    ("untied", {"pp": 2, "pp_schedule": "zbv"}),
    ("untied", {"dp_shard": 2, "cp": 2, "cp_kind": "ring", "activation_checkpointing": "selective"}),
]


@pytest.mark.slow  # each compiles C++ for a minute
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiled_blocks_compute_the_same(workers: WorkerPool, case: tuple[str, dict[str, Any]]) -> None:
    name, layout = case
    check(in_layout(workers, name, {**layout, "compile": True}), single(name), BOUND)
