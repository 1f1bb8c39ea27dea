"""Processes killed in the middle of a save that several make together: the newest checkpoint is whole, and leads on.

`make kills COUNT=200` kills more often; the seed is printed.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from layouts import RUNS, with_layout
from lives import killed_in_a_save, losses, undisturbed

from megatrain.checkpoint.inspect import require_whole
from megatrain.checkpoint.retention import committed_steps, step_name
from megatrain.runtime.workers import WorkerPool

COUNT = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("KILLS_SEED", "20"))
LAST = 40


@pytest.mark.timeout(0 if COUNT > 20 else 300)
@pytest.mark.parametrize(
    ("name", "layout", "is_async"),
    [
        ("untied", {"pp": 2, "pp_schedule": "1f1b"}, False),
        ("experts", {"dp_shard": 2, "ep": 2}, False),
        ("untied", {"tp": 2}, True),
        ("experts", {"pp": 2, "dp_shard": 2, "ep": 2}, True),
    ],
    ids=str,
)
def test_killed_saves(
    workers: WorkerPool, tmp_path: Path, name: str, layout: dict[str, Any], is_async: bool
) -> None:
    cfg = with_layout(RUNS[name], "fp64", layout)
    folder = tmp_path / "killed"
    folder.mkdir()
    print(f"seed {SEED}, {COUNT} kills")
    draw = random.Random(SEED)
    kills = 0
    for number in range(COUNT):
        kills += killed_in_a_save(cfg, folder, LAST * (number + 1), draw, is_async=is_async)
        checkpoints = folder / "checkpoints"
        for step in committed_steps(checkpoints):
            require_whole(checkpoints / step_name(step), progress=lambda name, share: None)
    assert kills >= COUNT - 1
    reached, differ = losses(folder)
    assert not differ, "a step was repeated with another loss"
    truth = undisturbed(cfg, tmp_path / "whole", max(reached))
    assert reached == {step: loss for step, loss in truth.items() if step in reached}
