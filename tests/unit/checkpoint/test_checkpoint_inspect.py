"""What is listed, shown and verified is what is there, and looking changes nothing."""

import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
from unit.checkpoint.samples import make_tensors, two_checkpoints
from unit.checkpoint.test_checkpoint_damage import (
    cut_one_byte,
    flip_a_bit,
    make_a_link,
    remove,
    zero_the_tail,
)
from unit.checkpoint.test_checkpoint_reader import forge

from megatrain.checkpoint import inspect
from megatrain.checkpoint.inspect import open_checkpoint, require_whole, verify
from megatrain.checkpoint.listing import checkpoint_directory, find_checkpoints, list_checkpoints
from megatrain.checkpoint.manifest import Manifest, file_size, read_manifest
from megatrain.config.errors import DamagedCheckpointError, UserError

DAMAGES = (flip_a_bit, zero_the_tail, cut_one_byte, remove, make_a_link)


def silent(phase: str, fraction: float) -> None:
    assert 0 <= fraction <= 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 100 and 200, which no test changes."""
    run = tmp_path_factory.mktemp("made") / "run"
    two_checkpoints(run / "checkpoints")
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def content(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the hash of each file or the target of each link."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


def test_everything_in_the_directory_is_listed_with_its_state(run: Path) -> None:
    directory = run / "checkpoints"
    size = sum(file.stat().st_size for file in (directory / "step-00000100").iterdir())
    (directory / "step-00000300").mkdir()
    shutil.copytree(directory / "step-00000200", directory / "step-00000400")
    shutil.copytree(directory / "step-00000200", directory / ".tmp-step-00000500-1f3a")
    shutil.copytree(directory / "step-00000200", directory / ".trash-step-00000050-77b2")
    shutil.copytree(directory / "step-00000200", directory / "quarantine" / "step-00000150-aa")
    (directory / "quarantine" / "step-00000150-aa" / "reason.json").write_text(
        '{"step": 150, "reason": "of rot"}'
    )
    (directory / "notes.txt").touch()
    later = read_manifest(directory / "step-00000100")
    shutil.copytree(directory / "step-00000100", directory / "step-00000600")
    text = Manifest(step=600, files=later.files, info={}, parent=None, format_version=99).render()
    (directory / "step-00000600" / "manifest.json").write_bytes(text)
    cut_one_byte(directory / "step-00000200" / "state.json")
    before = content(run)

    found = list_checkpoints(checkpoint_directory(run))

    assert content(run) == before
    assert [(each.step, each.state) for each in found] == [
        (50, "being deleted"),
        (100, "complete"),
        (150, "quarantined"),
        (200, "damaged"),
        (300, "damaged"),
        (400, "damaged"),
        (500, "unfinished"),
        (600, "unknown"),
    ]
    reasons = {each.step: each.reason for each in found}
    assert "state.json has" in reasons[200]
    assert reasons[300] == "manifest.json is missing"
    assert "belongs to step 200" in reasons[400]
    assert reasons[150] == "of rot"
    assert "later version" in reasons[600]
    complete = found[1]
    assert complete.bytes == size - (directory / "step-00000100" / "manifest.json").stat().st_size
    assert (complete.parent, complete.info) == (None, {"seed": 1})


def test_a_thousand_checkpoints_are_listed_at_once(made: Path, tmp_path: Path) -> None:
    """Complete, damaged and empty ones; 2 s are allowed, of which it takes some tenths."""
    source = made / "checkpoints" / "step-00000100"
    old = read_manifest(source)
    for step in range(1, 1001):
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        if step % 3:
            for name in old.files:
                os.link(source / name, path / name)
            (path / "manifest.json").write_bytes(
                Manifest(step=step, files=old.files, info=old.info, parent=None).render()
            )
        if step % 3 == 1:
            (path / "state.json").unlink()
    began = time.process_time()  # of this process alone: other load does not count
    found = list_checkpoints(checkpoint_directory(tmp_path))
    assert time.process_time() - began < 2
    assert [each.state for each in found[:3]] == ["damaged", "complete", "damaged"]
    assert len(found) == 1000


def test_a_path_names_a_run_a_directory_or_one_checkpoint(run: Path) -> None:
    directory = run / "checkpoints"
    both = [directory / "step-00000100", directory / "step-00000200"]
    assert find_checkpoints(run) == find_checkpoints(directory) == both
    assert find_checkpoints(both[0]) == both[:1]
    with pytest.raises(UserError, match="There are step-00000100, step-00000200"):
        find_checkpoints(directory / "step-00000300")
    with pytest.raises(UserError, match="no such directory"):
        find_checkpoints(run / "nothing")
    with pytest.raises(UserError, match=r"has no checkpoints.*It holds runs: .*run"):
        find_checkpoints(run.parent)
    shutil.move(both[0], directory / "quarantine" / "step-00000100-ab")
    with pytest.raises(UserError, match=r"in quarantine.*under the name step-00000100"):
        find_checkpoints(directory / "quarantine" / "step-00000100-ab")
    shutil.rmtree(both[1])
    with pytest.raises(UserError, match="no committed checkpoint \\(1 in quarantine\\)"):
        find_checkpoints(run)


def test_what_is_opened_is_what_was_saved(made: Path) -> None:
    opened = open_checkpoint(made / "checkpoints" / "step-00000200")
    wanted = {name: (t.dtype, t.shape, t.nbytes) for name, t in make_tensors(200).items()}
    specs = opened.reader.tensor_specs()
    assert {name: (spec.dtype, spec.size, spec.nbytes) for name, spec in specs.items()} == wanted
    assert opened.state == {"step": 200, "tokens": 1400}
    assert opened.manifest.info == {"seed": 1}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["__0_0_0.distcp", ".metadata", "state.json", "manifest.json"])
def test_every_damage_is_named_and_nothing_is_moved(run: Path, name: str, damage: object) -> None:
    path = run / "checkpoints" / "step-00000200"
    damage(path / name)  # type: ignore[operator]
    before = content(run)
    found = verify(path, progress=silent)
    assert found.state == "damaged"
    assert [each.file for each in found.damages] == [name]
    with pytest.raises(DamagedCheckpointError, match=r"step-00000200 is damaged: .*left as it is"):
        require_whole(path, progress=silent)
    assert content(run) == before
    assert verify(run / "checkpoints" / "step-00000100", progress=silent).state == "whole"


def test_all_damaged_files_are_named(run: Path) -> None:
    path = run / "checkpoints" / "step-00000200"
    for name in ("__0_0_0.distcp", "__0_1_0.distcp"):
        flip_a_bit(path / name)
    (path / "state.json").unlink()
    found = verify(path, progress=silent)
    assert {each.file: each.what for each in found.damages} == {
        "__0_0_0.distcp": "was changed: its hash is wrong",
        "__0_1_0.distcp": "was changed: its hash is wrong",
        "state.json": "is missing",
    }


def test_what_this_version_cannot_read_is_not_called_damaged(run: Path) -> None:
    """Its hashes are right: another version of torch may have written it. What it says is not executed either."""
    path = run / "checkpoints" / "step-00000200"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = json.JSONDecodeError("", "", 0)
    forge(path, pickle.dumps(metadata))
    found = verify(path, progress=silent)
    assert (found.state, found.damages) == ("unknown", ())
    assert "refused" in found.unknown
    with pytest.raises(UserError, match="of a form that this version does not read") as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 2


def test_a_checkpoint_deleted_while_it_is_read_is_not_called_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains removes its older checkpoints, by renaming them first."""
    path = run / "checkpoints" / "step-00000100"

    def delete_then_look(file: Path) -> int:
        if path.exists():
            path.rename(run / "checkpoints" / ".trash-step-00000100-ab")
        return file_size(file)

    monkeypatch.setattr(inspect, "file_size", delete_then_look)
    found = verify(path, progress=silent)
    assert (found.state, found.damages) == ("unknown", ())
    assert "deleted meanwhile" in found.unknown
    with pytest.raises(UserError, match="deleted meanwhile") as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 2
