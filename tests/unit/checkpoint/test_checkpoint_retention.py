"""Which checkpoints stay."""

import os
from pathlib import Path

import pytest
from unit.checkpoint.samples import make_tensors, two_checkpoints

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.retention import EVAL_LOSS, committed_steps, prune, retained
from megatrain.checkpoint.store import Checkpointer

ALL = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("keep", "left"), [(0, ALL), (1, [5]), (2, [4, 5]), (5, ALL), (9, ALL)])
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=keep))
    for step in range(1, 6):
        checkpointer.save(step, make_tensors(step), {})
    assert checkpointer.steps() == left
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in left]


STEPS = [10, 20, 30, 40, 50, 60]
LOSSES = {20: 3.0, 30: 1.0, 40: 2.0, 60: 1.5}


@pytest.mark.parametrize(
    ("options", "losses", "left"),
    [
        ({"keep": 0}, {}, STEPS),
        ({"keep": 0, "keep_every": 20, "keep_best": 1}, LOSSES, STEPS),
        ({"keep": 2}, LOSSES, [50, 60]),
        ({"keep": 9}, {}, STEPS),
        ({"keep": 1, "keep_every": 20}, {}, [20, 40, 60]),
        ({"keep": 2, "keep_every": 7}, {}, [50, 60]),
        ({"keep": 1, "keep_every": 1}, {}, STEPS),
        ({"keep": 1, "keep_best": 1}, LOSSES, [30, 60]),
        ({"keep": 1, "keep_best": 2}, LOSSES, [30, 60]),
        ({"keep": 1, "keep_best": 3}, LOSSES, [30, 40, 60]),
        ({"keep": 1, "keep_best": 9}, LOSSES, [20, 30, 40, 60]),
        ({"keep": 1, "keep_best": 1}, {10: 2.0, 20: 2.0}, [10, 60]),
        ({"keep": 1, "keep_best": 1}, {10: float("nan"), 20: 2.0}, [20, 60]),
        ({"keep": 1, "keep_best": 1}, {70: 0.5, 20: 2.0}, [20, 60]),
        ({"keep": 1, "keep_best": 1}, {}, [60]),
        ({"keep": 1, "keep_every": 50, "keep_best": 1}, LOSSES, [30, 50, 60]),
    ],
)
def test_what_is_kept(options: dict[str, int], losses: dict[int, float], left: list[int]) -> None:
    assert sorted(retained(STEPS, losses, CheckpointConfig(**options))) == left


def test_an_imported_model_is_not_one_of_the_regular_steps() -> None:
    assert retained([0, 5, 10], {}, CheckpointConfig(keep=1, keep_every=5)) == {5, 10}


def test_the_best_are_known_from_the_manifests(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=1))
    for step, loss in enumerate((3.0, 1.0, None, 2.0), start=1):
        checkpointer.save(step, make_tensors(step), {}, {} if loss is None else {EVAL_LOSS: loss})
    assert checkpointer.steps() == [2, 4]


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_the_newest_whole_one_is_not_deleted(tmp_path: Path, damage: str) -> None:
    """Newer ones are damaged: they have the places, but what can be resumed from stays."""
    checkpointer = two_checkpoints(tmp_path)
    for step in (300, 400):
        if damage == "empty":
            (tmp_path / f"step-{step:08d}").mkdir()
        else:
            checkpointer.save(step, make_tensors(step), {})
            os.truncate(tmp_path / f"step-{step:08d}" / "__0_0_0.distcp", 5)
    prune(tmp_path, CheckpointConfig(keep=1))
    assert checkpointer.steps() == [200, 400]


def test_other_names_are_no_checkpoints_and_are_left_alone(tmp_path: Path) -> None:
    names = [
        "step-1",
        "step-00000001x",
        "xstep-00000001",
        "step-000000001",
        ".tmp-step-00000001-a",
        "step--0000001",
        "notes",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "step-123456789").mkdir()  # more digits, when there are more steps
    assert committed_steps(tmp_path) == [123456789]
    prune(tmp_path, CheckpointConfig(keep=1))
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "step-123456789"])


def test_sweep_deletes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    for name in (".tmp-step-00000300-0123456789ab", ".trash-step-00000050-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0_0.distcp").write_bytes(b"x" * 100)
    assert checkpointer.steps() == [100, 200]
    checkpointer.remove_leftovers()
    assert sorted(os.listdir(tmp_path)) == ["step-00000100", "step-00000200"]
    Checkpointer(tmp_path / "none", CheckpointConfig()).remove_leftovers()


def test_a_quarantined_checkpoint_is_not_pruned_and_does_not_count(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    os.truncate(tmp_path / "step-00000200" / "state.json", 0)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    checkpointer.latest()
    checkpointer.save(200, make_tensors(200), {})
    assert checkpointer.steps() == [100, 200]
    assert len(os.listdir(tmp_path / "quarantine")) == 1
