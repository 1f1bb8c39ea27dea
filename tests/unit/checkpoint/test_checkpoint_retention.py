"""Which checkpoints stay."""

import os
from pathlib import Path

import pytest
from unit.checkpoint.samples import make_tensors, two_checkpoints

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.retention import committed_steps, prune
from megatrain.checkpoint.store import Checkpointer

ALL = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("keep", "left"), [(0, ALL), (1, [5]), (2, [4, 5]), (5, ALL), (9, ALL)])
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=keep))
    for step in range(1, 6):
        checkpointer.save(step, make_tensors(step), {})
    assert checkpointer.steps() == left
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in left]


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
    prune(tmp_path, keep=1)
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
