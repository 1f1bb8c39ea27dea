"""Pruned, copied and consolidated checkpoints: nothing good is lost, nothing is overwritten, every value arrives."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from unit.checkpoint.samples import all_bits, bits, make_tensors, targets_for
from unit.checkpoint.test_checkpoint_compare import COLUMNS, in_shards
from unit.checkpoint.test_checkpoint_damage import cut_one_byte, flip_a_bit
from unit.checkpoint.test_checkpoint_inspect import content, silent

from megatrain.checkpoint import upkeep
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.checkpoint.upkeep import consolidate, copy_checkpoint, prune_checkpoints
from megatrain.config.errors import DamagedCheckpointError, UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 to 4, which no test changes."""
    run = tmp_path_factory.mktemp("made") / "run"
    checkpointer = Checkpointer(run / "checkpoints", CheckpointConfig(keep=0))
    for step in range(1, 5):
        checkpointer.save(step, make_tensors(step), {"step": step, "tokens": step}, {"seed": 1})
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return Checkpointer(run / "checkpoints", CheckpointConfig()).steps()


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def pruned(run: Path, keep: int, *, dry_run: bool = False) -> list[int]:
    removals = prune_checkpoints(run / "checkpoints", keep, dry_run=dry_run, progress=silent)
    return [each.step for each in removals]


def test_prune_keeps_the_newest(run: Path) -> None:
    before = content(run)
    assert pruned(run, 2, dry_run=True) == [1, 2]
    assert content(run) | {".lock": ""} == before | {".lock": ""}
    assert pruned(run, 2) == [1, 2]
    assert steps(run) == [3, 4]
    assert pruned(run, 2) == pruned(run, 5) == []


def test_prune_counts_good_ones_only(run: Path) -> None:
    """Whose bytes are right, not only their sizes; damaged ones that are newer are left for the next start."""
    flip_a_bit(step(run, 4) / "__0_0_0.distcp")
    cut_one_byte(step(run, 2) / "state.json")
    (run / "checkpoints" / "step-00000005").mkdir()
    assert pruned(run, 1) == [1, 2]
    assert steps(run) == [3, 4, 5]
    flip_a_bit(step(run, 3) / "__0_0_0.distcp")
    assert pruned(run, 1) == []
    assert steps(run) == [3, 4, 5]


def test_prune_removes_what_killed_processes_left_and_no_quarantine(run: Path) -> None:
    directory = run / "checkpoints"
    shutil.copytree(step(run, 4), directory / ".tmp-step-00000005-ab")
    shutil.copytree(step(run, 1), directory / "quarantine" / "step-00000000-cd")
    assert pruned(run, 4) == [5]
    assert sorted(os.listdir(directory)) == ["quarantine", *(f"step-0000000{n}" for n in range(1, 5))]


def test_a_training_run_is_not_touched(run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        lock.write("owner")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = content(run)
        with pytest.raises(UserError, match="is training"):
            pruned(run, 1)
        assert content(run) == before
    assert pruned(run, 1) == [1, 2, 3]
    assert (run / ".lock").read_text() == "owner"


@pytest.mark.parametrize("keep", [0, -1])
def test_prune_keeps_at_least_one(run: Path, keep: int) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        pruned(run, keep)


def test_a_copy_is_loaded_as_the_original_is(run: Path, tmp_path: Path) -> None:
    before = content(run)
    target = copy_checkpoint(step(run, 3), tmp_path / "other" / "place", progress=silent)
    assert target == tmp_path / "other" / "place" / "step-00000003"
    assert content(target) == content(step(run, 3))
    assert os.listdir(target.parent) == ["step-00000003"]
    found = Checkpointer(target.parent, CheckpointConfig()).load(loaded := targets_for(make_tensors(3)))
    assert found is not None
    assert all_bits(loaded) == all_bits(make_tensors(3))
    assert content(run) == before


def test_a_copy_goes_into_the_checkpoints_of_a_run_that_does_not_train(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run2"
    (other / "checkpoints").mkdir(parents=True)
    with (other / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is training"):
            copy_checkpoint(step(run, 3), other, progress=silent)
    assert copy_checkpoint(step(run, 3), other, progress=silent) == step(other, 3)
    with pytest.raises(UserError, match="nothing is overwritten"):
        copy_checkpoint(step(run, 3), other, progress=silent)


@pytest.mark.parametrize("name", ["__0_0_0.distcp", "state.json", "manifest.json"])
def test_damage_is_not_copied(run: Path, tmp_path: Path, name: str) -> None:
    flip_a_bit(step(run, 3) / name)
    said = f"{step(run, 3)} is damaged: {name} "  # the source, not the copy that was begun
    with pytest.raises(DamagedCheckpointError, match=re.escape(said)):
        copy_checkpoint(step(run, 3), tmp_path / "other", progress=silent)
    assert not (tmp_path / "other").exists() or not os.listdir(tmp_path / "other")


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"bytes are needed, and 1,000 are free"):
        copy_checkpoint(step(run, 3), tmp_path / "other", progress=silent)
    with pytest.raises(UserError, match=r"bytes are needed, and 1,000 are free"):
        consolidated(step(run, 3), tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) in (["other", "run"], ["run"])
    assert not (tmp_path / "other").exists() or not os.listdir(tmp_path / "other")


def consolidated(source: Path, target: Path, *, only: str = "", shard_bytes: int = 1 << 40) -> int:
    done = consolidate(source, target, only=only, shard_bytes=shard_bytes, progress=silent)
    assert done.tensors == sum(1 for name in make_tensors(0) if not only or name.startswith("optim."))
    return done.files


def test_one_file_has_every_bit(run: Path, tmp_path: Path) -> None:
    assert consolidated(step(run, 3), tmp_path / "all.safetensors") == 1
    assert all_bits(load_file(tmp_path / "all.safetensors")) == all_bits(make_tensors(3))
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3", "source": "MegaTrain checkpoint"}
    raw = (tmp_path / "all.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in make_tensors(3).items():  # aligned, so that it can be mapped into memory
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    consolidated(step(run, 3), tmp_path / "optimizer.safetensors", only="optimizer")
    kept = {name: tensor for name, tensor in make_tensors(3).items() if name.startswith("optim.")}
    assert all_bits(load_file(tmp_path / "optimizer.safetensors")) == all_bits(kept)


def test_shards_are_bounded_and_the_index_finds_every_tensor(run: Path, tmp_path: Path) -> None:
    files = consolidated(step(run, 3), tmp_path / "out", shard_bytes=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) == files > 2
    assert names | {"model.safetensors.index.json"} == set(os.listdir(tmp_path / "out"))
    tensors = make_tensors(3)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert bits(load_file(tmp_path / "out" / file)[name]) == bits(tensors[name])
    for file in names:
        held = [name for name, each in index["weight_map"].items() if each == file]
        assert len(held) == 1 or sum(tensors[name].nbytes for name in held) <= 1000


def test_shards_of_a_layout_become_whole_tensors(tmp_path: Path) -> None:
    whole = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    opened = in_shards(tmp_path / "a", "model.w", whole, COLUMNS)
    consolidate(opened.path, tmp_path / "w.safetensors", only="", shard_bytes=1, progress=silent)
    assert all_bits(load_file(tmp_path / "w.safetensors")) == all_bits({"model.w": whole})


def test_consolidate_refuses_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="nothing is overwritten"):
        consolidated(step(run, 3), tmp_path / "there")
    with pytest.raises(UserError, match="no tensors of the kind average"):
        consolidate(step(run, 3), tmp_path / "x", only="average", shard_bytes=1, progress=silent)
    flip_a_bit(step(run, 3) / "__0_1_0.distcp")
    with pytest.raises(DamagedCheckpointError, match=r"__0_1_0\.distcp was changed"):
        consolidated(step(run, 3), tmp_path / "x")
    odd = Checkpointer(tmp_path / "odd", CheckpointConfig()).save(
        1, {"w": torch.zeros(2, dtype=torch.cfloat)}, {}
    )
    with pytest.raises(UserError, match="w has the dtype"):
        consolidate(odd, tmp_path / "x", only="", shard_bytes=1, progress=silent)
    assert sorted(os.listdir(tmp_path)) == ["odd", "run", "there"]
