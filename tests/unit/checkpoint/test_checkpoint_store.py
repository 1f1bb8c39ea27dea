"""What is saved comes back bit for bit, and only into the tensors that it came from."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from unit.checkpoint.samples import all_bits, bits, make_tensors, targets_for, two_checkpoints

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointMismatchError, CheckpointSaveError
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError


def test_every_kind_of_tensor_comes_back_bitwise(tmp_path: Path) -> None:
    saved = make_tensors(seed=3)
    state = {"step": 5, "watch": {"best": 1.25, "names": ["a", "é"], "none": None}, "tokens": 2**60}
    two_checkpoints(tmp_path).save(300, saved, state, {"data_fingerprint": "f"})
    loaded = targets_for(saved)
    storages = {name: tensor.data_ptr() for name, tensor in loaded.items()}

    found = Checkpointer(tmp_path, CheckpointConfig()).load(loaded)

    assert found is not None
    assert (found.step, found.state, found.warnings) == (300, state, ())
    assert found.manifest.info == {"data_fingerprint": "f"}
    assert found.manifest.parent == "step-00000200"
    assert all_bits(loaded) == all_bits(saved)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == storages  # in place


def test_large_tensors_fill_both_files(tmp_path: Path) -> None:
    """Large enough that the disk starts before the end, and that each file has a share."""
    saved = {f"w{n}": torch.randn(1 << 20, generator=torch.Generator().manual_seed(n)) for n in range(20)}
    path = Checkpointer(tmp_path, CheckpointConfig()).save(1, saved, {})
    sizes = [file.stat().st_size for file in path.glob("*.distcp")]
    assert len(sizes) == 2
    assert min(sizes) > 0.9 * max(sizes)
    loaded = targets_for(saved)
    Checkpointer(tmp_path, CheckpointConfig()).load(loaded)
    assert all_bits(loaded) == all_bits(saved)


def test_the_manifest_lists_every_file_with_the_hash_that_another_program_finds(tmp_path: Path) -> None:
    path = two_checkpoints(tmp_path).directory / "step-00000200"
    listed = json.loads((path / "manifest.json").read_text())["files"]
    on_disk = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    assert listed == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in on_disk.items()
    }


def test_plain_torch_reads_it(tmp_path: Path) -> None:
    path = two_checkpoints(tmp_path).directory / "step-00000200"
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    assert all_bits(torch.load(tmp_path / "plain.pt", weights_only=True)) == all_bits(make_tensors(200))


def test_the_same_state_gives_the_same_files(tmp_path: Path) -> None:
    """So that a step that is reached again can be compared; nothing in a file depends on time or place."""
    paths = [
        Checkpointer(tmp_path / name, CheckpointConfig()).save(1, make_tensors(1), {"a": 1})
        for name in ("a", "b")
    ]
    first, second = (
        {f.name: f.read_bytes() for f in p.iterdir() if f.name != "manifest.json"} for p in paths
    )
    assert first == second


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_is_silent_about_extra_keys_and_dtypes(tmp_path: Path) -> None:
    """Why the names and dtypes are compared here."""
    dcp.save({"a": torch.ones(2), "b": torch.ones(2)}, checkpoint_id=tmp_path / "raw", no_dist=True)
    other = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(other, checkpoint_id=tmp_path / "raw", no_dist=True)
    assert other["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.w": None}, "model.layers.0.w: only in the checkpoint"),
        ({"model.new": torch.zeros(3)}, "model.new: not in the checkpoint"),
        (
            {"optim.step": torch.zeros(1)},
            r"optim.step: float32 \(\) in the checkpoint, float32 \(1,\) here",
        ),
        (
            {"model.layers.0.bf16": torch.zeros(33, 7)},
            r"bfloat16 \(33, 7\) in the checkpoint, float32 \(33, 7\) here",
        ),
        (
            {"model.layers.0.w": torch.zeros(96, 64)},
            r"float32 \(64, 96\) in the checkpoint, float32 \(96, 64\) here",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    checkpointer = two_checkpoints(tmp_path)
    wanted = {**targets_for(make_tensors(200)), **change}
    asked = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    before = all_bits(asked)
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        checkpointer.load(asked)
    assert caught.value.exit_code == 2
    assert all_bits(asked) == before
    assert checkpointer.steps() == [100, 200]  # it is good: nothing is put aside


def test_a_part_can_be_loaded_and_is_as_strict(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    saved = {name: tensor for name, tensor in make_tensors(200).items() if name.startswith("model.")}
    loaded = targets_for(saved)
    checkpointer.load(loaded, only="model.")
    assert all_bits(loaded) == all_bits(saved)
    loaded.pop("model.nan")
    with pytest.raises(CheckpointMismatchError, match=r"model\.nan: only in the checkpoint"):
        checkpointer.load(loaded, only="model.")


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "none", CheckpointConfig())
    assert checkpointer.latest() is None
    assert checkpointer.load({"a": torch.zeros(1)}) is None
    assert not checkpointer.directory.exists()


def test_a_step_reached_again_is_kept_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    path = tmp_path / "step-00000200"
    created = (path / "manifest.json").read_bytes()

    assert checkpointer.save(200, make_tensors(200), {"step": 200, "tokens": 1400}, {"seed": 1}) == path
    assert (path / "manifest.json").read_bytes() == created
    with pytest.raises(CheckpointSaveError, match=r"already saved.*state\.json"):
        checkpointer.save(200, make_tensors(200), {"step": 200, "tokens": 0})
    with pytest.raises(CheckpointSaveError, match=r"already saved.*distcp"):
        checkpointer.save(200, make_tensors(201), {"step": 200, "tokens": 1400})
    assert sorted(os.listdir(tmp_path)) == ["step-00000100", "step-00000200"]
    assert (path / "manifest.json").read_bytes() == created


def test_a_damaged_step_reached_again_makes_room(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    os.truncate(tmp_path / "step-00000200" / "state.json", 1)
    checkpointer.save(200, make_tensors(200), {"step": 200})
    found = checkpointer.load(targets := targets_for(make_tensors(200)))
    assert found is not None
    assert (found.step, found.warnings) == (200, ())
    assert all_bits(targets) == all_bits(make_tensors(200))
    assert len(os.listdir(tmp_path / "quarantine")) == 1


def test_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    for state in ({"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="JSON"):
            Checkpointer(tmp_path, CheckpointConfig()).save(1, make_tensors(1), state)
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    huge = {"w": torch.zeros(1).expand(2**50)}  # 4 PiB that take four bytes
    with pytest.raises(CheckpointSaveError, match=r"needs 4,503,599,627,.* bytes .*free") as caught:
        checkpointer.save(1, huge, {})
    assert f"{tmp_path}" in str(caught.value)
    with pytest.raises(UserError, match="cannot be written"):
        checkpointer.preflight(huge)
    checkpointer.preflight(make_tensors(1))
    assert os.listdir(tmp_path) == []


def test_a_thousand_checkpoints_are_resolved_in_less_than_two_seconds(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    template = tmp_path / "step-00000100"
    for step in range(201, 1201):
        (tmp_path / f"step-{step:08d}").mkdir()
        for file in template.iterdir():
            os.link(file, tmp_path / f"step-{step:08d}" / file.name)
    checkpointer.save(1201, make_tensors(1201), {})
    begin = time.perf_counter()
    found = checkpointer.load(targets := targets_for(make_tensors(1)))
    seconds = time.perf_counter() - begin
    assert found is not None
    assert found.step == 1201
    assert bits(targets["optim.scalar"]) == bits(torch.tensor(1201))
    assert seconds < 2  # the promise; about 0.02 s are usual


def test_a_thousand_damaged_ones_are_passed_in_less_than_two_seconds(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    for step in range(201, 1201):
        (tmp_path / f"step-{step:08d}").mkdir()
        if step % 2:
            (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{")
    begin = time.perf_counter()
    found = checkpointer.latest()
    seconds = time.perf_counter() - begin
    assert found is not None
    assert found.step == 200
    assert len(os.listdir(tmp_path / "quarantine")) == 1000
    assert "992 more checkpoints" in found.warnings[-1]
    assert len(found.warnings) == 9
    assert (
        seconds < 2
    )  # about 0.4 s are usual; 11 s when each was synced and the directory was listed for each
