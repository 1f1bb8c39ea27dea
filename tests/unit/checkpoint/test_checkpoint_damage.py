"""Every byte class damaged once: always noticed, never loaded, and the older checkpoint is taken."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from unit.checkpoint.samples import all_bits, make_tensors, targets_for, two_checkpoints

from megatrain.checkpoint import store
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.manifest import Manifest, check_sizes, read_manifest
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import DamagedCheckpointError, UserError

FILES = ("__0_0_0.distcp", "__0_1_0.distcp", ".metadata", "state.json", "manifest.json")


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_one_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def add_one_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def zero_the_tail(file: Path) -> None:
    """As after a power cut: the size was recorded, the last blocks were not written."""
    data = bytearray(file.read_bytes())
    tail = min(4096, len(data) // 2)
    data[-tail:] = bytes(tail)
    file.write_bytes(data)


def remove(file: Path) -> None:
    file.unlink()


def take_the_other_steps(file: Path) -> None:
    shutil.copy(file.parents[1] / "step-00000100" / file.name, file)


def make_a_link(file: Path) -> None:
    shutil.move(file, file.parents[1] / "elsewhere")
    file.symlink_to(file.parents[1] / "elsewhere")


def make_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (
    halve,
    cut_one_byte,
    add_one_byte,
    flip_a_bit,
    zero_the_tail,
    remove,
    take_the_other_steps,
    make_a_link,
    make_a_directory,
)


CASES = [
    pytest.param(name, damage, id=f"{name} {damage.__name__}")
    for name in FILES
    for damage in DAMAGES
    if (name, damage) != (".metadata", take_the_other_steps)  # shapes did not change: the same bytes
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_noticed_and_the_older_checkpoint_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    checkpointer = two_checkpoints(tmp_path)
    assert {file.name for file in (tmp_path / "step-00000200").iterdir()} == set(FILES)
    damage(tmp_path / "step-00000200" / name)

    loaded = targets_for(make_tensors(100))
    found = checkpointer.load(loaded)

    assert found is not None
    assert (found.step, found.state) == (100, {"step": 100, "tokens": 700})
    assert all_bits(loaded) == all_bits(make_tensors(100))
    assert checkpointer.steps() == [100]
    (aside,) = (tmp_path / "quarantine").iterdir()
    reason = json.loads((aside / "reason.json").read_text())
    assert reason["step"] == 200
    (warning,) = found.warnings
    assert reason["reason"] in warning
    assert str(aside) in warning


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    file = tmp_path / "step-00000200" / "manifest.json"
    good = file.read_bytes()
    for place in range(0, len(good), 7):
        changed = bytearray(good)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        found = checkpointer.latest()
        assert found is not None
        assert found.step == 100, f"bit {place % 8} of byte {place}"
        (aside,) = (tmp_path / "quarantine").iterdir()
        (aside / "reason.json").unlink()
        aside.rename(tmp_path / "step-00000200")
    file.write_bytes(good)
    found = checkpointer.latest()
    assert found is not None
    assert found.step == 200


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_loads_a_flipped_bit(tmp_path: Path) -> None:
    """Why there are hashes: plain torch.distributed.checkpoint gives a wrong number without a word."""
    dcp.save({"w": torch.full((1000,), 3.0)}, checkpoint_id=tmp_path, no_dist=True)
    (file,) = tmp_path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    place = bytes(data).index(b"\x00\x00\x40\x40" * 100) + 200 + 3
    data[place] ^= 0x10
    file.write_bytes(data)
    loaded = {"w": torch.zeros(1000)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert loaded["w"].ne(3).sum() == 1


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d not in (flip_a_bit, take_the_other_steps)])
def test_sizes_and_structure_are_checked_without_hashes_too(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpointer = two_checkpoints(tmp_path, verify=False)
    damage(tmp_path / "step-00000200" / "__0_0_0.distcp")
    found = checkpointer.load(loaded := targets_for(make_tensors(100)))
    assert found is not None
    assert found.step == 100
    assert all_bits(loaded) == all_bits(make_tensors(100))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "was", "now"),
    [("state.json", b"1400", b"1401"), (".metadata", b"\x8c\x07float64", b"\x8c\x07float32")],
)
def test_a_small_file_that_says_something_else_is_damage(
    tmp_path: Path, name: str, was: bytes, now: bytes, verify: bool
) -> None:
    """It is still JSON, or a sound pickle: only its hash tells, and it is not taken for another model's."""
    checkpointer = two_checkpoints(tmp_path, verify=verify)
    file = tmp_path / "step-00000200" / name
    assert was in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(was, now))
    found = checkpointer.load(targets_for(make_tensors(100)))
    assert found is not None
    assert found.step == 100
    assert "its hash is wrong" in found.warnings[0]


def test_a_checkpoint_deleted_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process reads while training goes on: the newest of its listing may be gone a moment later."""
    two_checkpoints(tmp_path)

    def save_then_check(directory: Path, manifest: Manifest) -> None:
        if manifest.step == 200:
            Checkpointer(tmp_path, CheckpointConfig(keep=1)).save(300, make_tensors(300), {})
        check_sizes(directory, manifest)

    monkeypatch.setattr(store, "check_sizes", save_then_check)
    found = Checkpointer(tmp_path, CheckpointConfig()).load(loaded := targets_for(make_tensors(300)))
    assert found is not None
    assert (found.step, found.warnings) == (300, ())
    assert all_bits(loaded) == all_bits(make_tensors(300))
    assert os.listdir(tmp_path) == ["step-00000300"]


def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = two_checkpoints(tmp_path)

    def refuse(directory: Path, manifest: Manifest) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    monkeypatch.setattr(store, "check_hashes", refuse)  # root, as tests often run, may read everything
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        checkpointer.latest()
    assert checkpointer.steps() == [100, 200]


def test_when_none_is_good_the_exit_code_is_3_now_and_later(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    halve(tmp_path / "step-00000100" / "state.json")
    flip_a_bit(tmp_path / "step-00000200" / "__0_0_0.distcp")
    for _ in range(2):  # the second time the directory holds nothing but the quarantine: still no fresh start
        with pytest.raises(DamagedCheckpointError, match="No intact checkpoint is left") as caught:
            checkpointer.load(targets_for(make_tensors(100)))
        assert caught.value.exit_code == 3
        assert "Restore one" in str(caught.value)


def test_a_later_format_is_no_damage(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    path = tmp_path / "step-00000200"
    old = read_manifest(path)
    later = Manifest(step=200, files=old.files, info={}, parent=None, format_version=99)
    (path / "manifest.json").write_bytes(later.render())
    with pytest.raises(UserError, match="later version"):
        checkpointer.latest()
    assert checkpointer.steps() == [100, 200]


def test_a_fault_of_the_device_does_not_condemn_a_good_checkpoint(tmp_path: Path) -> None:
    """Reading fails, the hashes are right: the checkpoint stays, and the error is shown as it is."""
    checkpointer = two_checkpoints(tmp_path, verify=False)
    wanted = targets_for(make_tensors(200)) | {"model.layers.0.w": torch.zeros(1).expand(64, 96)}
    with pytest.raises(RuntimeError, match="single memory location"):
        checkpointer.load(wanted)
    assert checkpointer.steps() == [100, 200]


def test_a_directory_without_a_manifest_is_damaged(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path)
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000400").write_text("a file")
    (tmp_path / "step-00000500").symlink_to(tmp_path / "step-00000100")
    found = checkpointer.latest()
    assert found is not None
    assert found.step == 200
    assert len(found.warnings) == 3
    assert (tmp_path / "step-00000100" / "manifest.json").exists()
    assert Checkpointer(tmp_path, CheckpointConfig()).steps() == [100, 200]
