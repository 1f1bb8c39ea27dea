"""A run goes on in any layout: its next steps are those of the run that was never interrupted."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import RUNS, STORE, with_layout
from resharding import Part, go_on
from test_parity import BOUND

from megatrain.parallel.layout import layout_summary, world_size
from megatrain.runtime.workers import WorkerPool
from megatrain.train.config import Config
from megatrain.train.parity import Arrays, relative_errors

LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "uneven": [
        {},
        {"dp_shard": 2, "zero_stage": 3},
        {"tp": 4},
        {"pp": 2, "dp_shard": 2, "pp_schedule": "zbv"},
        {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1},
        {"cp": 2, "cp_kind": "ring"},
        {"pp": 2, "tp": 2, "pp_schedule": "interleaved_1f1b"},
        {"dp_shard": 4, "tp": 2, "zero_stage": 2},
    ],
    "uneven_muon": [
        {},
        {"dp_shard": 4, "ep": 4},
        {"tp": 2},
        {"pp": 2, "dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "tp": 2, "ep": 4},
        {"cp": 2, "ep": 2},
        {"dp_shard": 2, "zero_stage": 1},
        {"dp_shard": 2, "tp": 4},
    ],
    "rounded_uneven": [{"dp_shard": 2}, {"tp": 4}, {"pp": 2, "tp": 2}, {}],
    "int8_experts": [{"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "ep": 2}, {}, {"tp": 2, "pp": 2}],
}
"""Dense with AdamW, experts with Muon, and sizes that the axes do not divide; states that are rounded to bf16 by random
bits, and states of 8 bits; moving averages in all."""


def config(name: str, layout: dict[str, Any]) -> Config:
    cfg = with_layout(RUNS[name], "fp64", layout)
    return replace(cfg, train=replace(cfg.train, ema_decay=0.9))


@cache
def uninterrupted(name: str) -> Part:
    return go_on(config(name, {}), STORE, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


def saved_in(workers: WorkerPool, folder: Path, name: str, number: int) -> str:
    """Return the checkpoints of a run that was saved in that layout; each is made once."""
    target = folder / f"{name}-{number}"
    if not target.exists():
        cfg = config(name, LAYOUTS[name][number])
        workers.run(go_on, world_size(cfg.parallel), cfg, STORE, None, str(target))
    return str(target)


def moves(per_layout: int) -> list[Any]:
    """The moves from each layout to the `per_layout` after it, in a ring; half of the nearest are not slow."""
    found = []
    for name, layouts in LAYOUTS.items():
        for source in range(len(layouts)):
            for step in range(1, min(per_layout + 1, len(layouts))):
                target = (source + step) % len(layouts)
                label = " to ".join(
                    layout_summary(config(name, layouts[n]).parallel) or "one process"
                    for n in (source, target)
                )
                small = world_size(config(name, layouts[target]).parallel) <= 4
                in_default_suite = step == 1 and source % 2 == 0 and small
                marks = [] if in_default_suite else [pytest.mark.slow]
                found.append(pytest.param(name, source, target, id=f"{name} {label}", marks=marks))
    return found


def joined(parts: list[Part], which: str) -> Arrays:
    return {key: array for part in parts for key, array in getattr(part, which).items()}


@pytest.mark.parametrize(("name", "source", "target"), moves(7))
def test_the_next_steps_are_those_of_the_run_that_was_never_interrupted(
    workers: WorkerPool, folder: Path, name: str, source: int, target: int
) -> None:
    truth, cfg = uninterrupted(name), config(name, LAYOUTS[name][target])
    checkpoints = saved_in(workers, folder, name, source)
    parts = workers.run(go_on, world_size(cfg.parallel), cfg, STORE, checkpoints, None)
    for part in parts:
        assert part.digests == truth.digests
        np.testing.assert_allclose(part.losses, truth.losses, rtol=BOUND)
        np.testing.assert_allclose(part.grad_norms, truth.grad_norms, rtol=BOUND)
    for which in ("start", "end"):
        errors = relative_errors(joined(parts, which), getattr(truth, which))
        worst = max(errors, key=lambda key: errors[key])
        assert errors[worst] <= BOUND, (which, worst, errors[worst])
