"""A durable tier has a checkpoint as a whole or not at all, and gives back every bit of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.registry import _registry
from unit.checkpoint.samples import all_bits, make_tensors, targets_for, two_checkpoints
from unit.checkpoint.tiers import memory_url

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.fetching import cached_checkpoint, fetch_newest, split_address
from megatrain.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatrain.checkpoint.store import Checkpointer
from megatrain.checkpoint.tier import Tier, content_name
from megatrain.checkpoint.tier_listing import list_tier
from megatrain.checkpoint.tier_upkeep import copy_anywhere, prune_tier, verify_tier
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.runtime.ownership import Owner, StaleOwnerError

NOBODY: Callable[[], None] = lambda: None  # noqa: E731


def silent(phase: str, fraction: float) -> None: ...


def owner(nonce: str) -> Owner:
    return Owner(token=1, nonce=nonce, host="a-host", pid=7, job=None, since="2026-11-28T20:00:00+00:00")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    two_checkpoints(tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(params=["memory", "file", "path"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    places = {"memory": memory_url(), "file": f"file://{tmp_path}/tier", "path": str(tmp_path / "tier")}
    return Tier(places[request.param])


def filled(tier: Tier, checkpoints: Path) -> Tier:
    for step in (100, 200):
        tier.upload(checkpoints / f"step-{step:08d}", require_owner=NOBODY)
    return tier


def place(tier: Tier, step: int, name: str) -> str:
    """Where a file of a checkpoint lies, as the manifest there says; without one, in the directory of the step."""
    if name != MANIFEST_FILE and step in tier.steps():
        return tier._content(tier.manifest(step), name)
    return tier._path(tier._name(step, name))


def damage(tier: Tier, step: int, name: str, content: bytes | None) -> None:
    """Replace a file behind the tier's back; None: remove it."""
    path = place(tier, step, name)
    if content is None:
        tier._fs.rm(path)
    else:
        store(tier, path, content)


def store(tier: Tier, path: str, content: bytes) -> None:
    tier._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    with tier._fs.open(path, "wb") as file:
        file.write(content)


def flipped(tier: Tier, step: int, name: str) -> bytes:
    content = tier._fs.cat_file(place(tier, step, name))
    return bytes(content[:-1]) + bytes([content[-1] ^ 1])


def a_tensor_file(checkpoints: Path, step: int) -> str:
    files = read_manifest(checkpoints / f"step-{step:08d}").files
    return max(files, key=lambda name: files[name].size)


def test_what_was_uploaded_comes_back_bit_by_bit(tier: Tier, checkpoints: Path, tmp_path: Path) -> None:
    filled(tier, checkpoints)
    assert tier.steps() == [100, 200]
    path, warnings = fetch_newest(tier, tmp_path / "new", newer_than=100, progress=silent)
    assert path is not None
    assert (path.name, warnings) == ("step-00000200", [])
    found = Checkpointer(tmp_path / "new", CheckpointConfig()).load(loaded := targets_for(make_tensors(1)))
    assert found is not None
    assert all_bits(loaded) == all_bits(make_tensors(200))
    assert (path / MANIFEST_FILE).read_bytes() == (checkpoints / path.name / MANIFEST_FILE).read_bytes()
    assert fetch_newest(tier, tmp_path / "new", newer_than=200, progress=silent) == (None, [])


def test_an_upload_goes_on_with_what_is_missing_or_differs(tier: Tier, checkpoints: Path) -> None:
    source = checkpoints / "step-00000200"
    whole = tier.upload(source, require_owner=NOBODY)
    assert whole > sum(record.size for record in read_manifest(source).files.values())
    assert tier.upload(source, require_owner=NOBODY) == 0
    manifest_size = (source / MANIFEST_FILE).stat().st_size
    name = a_tensor_file(checkpoints, 200)
    size = read_manifest(source).files[name].size
    for content in (None, b"short", flipped(tier, 200, name)):  # as if cut off there: no manifest yet
        damage(tier, 200, name, content)
        damage(tier, 200, MANIFEST_FILE, None)
        assert tier.steps() == []
        assert tier.upload(source, require_owner=NOBODY) == size + manifest_size
        assert verify_tier(tier, 200, progress=silent)[0].state == "whole"


def test_another_attempt_at_a_step_replaces_it_whole(tier: Tier, checkpoints: Path, tmp_path: Path) -> None:
    filled(tier, checkpoints)
    other = Checkpointer(tmp_path / "other", CheckpointConfig())
    other.save(200, make_tensors(7), {"step": 200})
    first = content_name(tier.manifest(200), "late.distcp")
    tier.upload(tmp_path / "other" / "step-00000200", require_owner=NOBODY)
    store(tier, tier._path(tier._name(200, first)), b"of a killed process's request that arrives late")
    tier.fetch(200, tmp_path / "back")
    Checkpointer(tmp_path / "back", CheckpointConfig()).load(loaded := targets_for(make_tensors(1)))
    assert all_bits(loaded) == all_bits(make_tensors(7))
    assert [each.state for each in verify_tier(tier, None, progress=silent)] == ["whole", "whole"]
    tier.upload(checkpoints / "step-00000200", require_owner=NOBODY)
    assert {name.partition("/")[0] for name in tier.stored()[200]} == {first.partition("/")[0], MANIFEST_FILE}


def test_a_damaged_checkpoint_here_is_not_committed_there(tier: Tier, checkpoints: Path) -> None:
    name = a_tensor_file(checkpoints, 200)
    path = checkpoints / "step-00000200" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptCheckpointError, match=f"{name} was changed"):
        tier.upload(path.parent, require_owner=NOBODY)
    assert tier.steps() == []


def test_damage_there_is_named_and_the_older_one_is_taken(
    tier: Tier, checkpoints: Path, tmp_path: Path
) -> None:
    name = a_tensor_file(checkpoints, 200)
    for number, content in enumerate((b"short", None, flipped(filled(tier, checkpoints), 200, name))):
        damage(tier, 200, name, content)
        directory = tmp_path / f"new{number}"
        path, warnings = fetch_newest(tier, directory, newer_than=-1, progress=silent)
        assert path == directory / "step-00000100"
        assert name in warnings[0]
        assert tier.address(200) in warnings[0]
        assert [each.name for each in directory.iterdir()] == ["step-00000100"]
        found = verify_tier(tier, None, progress=silent)
        assert [(each.state, [one.file for one in each.damages]) for each in found] == [
            ("whole", []),
            ("damaged", [name]),
        ]
    damage(tier, 200, MANIFEST_FILE, flipped(tier, 200, MANIFEST_FILE))
    assert fetch_newest(tier, tmp_path / "last", newer_than=-1, progress=silent)[0] is not None
    assert [each.state for each in list_tier(tier)] == ["complete", "damaged"]


def test_who_lost_the_tier_uploads_nothing_more(tier: Tier, checkpoints: Path) -> None:
    tier.take(owner("first"), "run-a")
    tier.require(owner("first"))
    tier.take(owner("second"), "run-a")
    assert (tier.run_id(), tier.owner()) == ("run-a", (owner("second"), "run-a"))
    with pytest.raises(StaleOwnerError, match="process 7 on a-host"):
        tier.upload(checkpoints / "step-00000100", require_owner=lambda: tier.require(owner("first")))
    assert tier.stored() == {}


def test_the_owner_is_asked_once_more_before_the_commit(tier: Tier, checkpoints: Path) -> None:
    files = len(read_manifest(checkpoints / "step-00000100").files)
    asked = 0

    def require() -> None:
        nonlocal asked
        asked += 1
        if asked > files + 1:
            raise StaleOwnerError("somebody else")

    with pytest.raises(StaleOwnerError):
        tier.upload(checkpoints / "step-00000100", require_owner=require)
    assert tier.steps() == []


def test_pruned_by_the_rules_of_the_run(tier: Tier, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "run", CheckpointConfig(keep=0))
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.6)):
        path = checkpointer.save(
            step, {"model.w": make_tensors(step)["model.double"]}, {}, {"eval_loss": loss}
        )
        tier.upload(path, require_owner=NOBODY)
    damage(tier, 20, MANIFEST_FILE, flipped(tier, 20, MANIFEST_FILE))
    damage(tier, 60, "half.distcp", b"an upload that was cut off")
    damage(tier, 70, "half.distcp", b"one under way")
    tier.prune(
        CheckpointConfig(keep=1, keep_every=20, keep_best=1), require_owner=NOBODY, spare=[70]
    )  # 20 is no best: its manifest can't be read
    assert sorted(tier.stored()) == [20, 30, 40, 50, 70]
    with pytest.raises(StaleOwnerError):
        tier.prune(
            CheckpointConfig(keep=1), require_owner=lambda: (_ for _ in ()).throw(StaleOwnerError("no"))
        )
    assert sorted(tier.stored()) == [20, 30, 40, 50, 70]


def test_pruned_by_hand(tier: Tier, checkpoints: Path) -> None:
    filled(tier, checkpoints)
    name = a_tensor_file(checkpoints, 200)
    damage(tier, 50, "half.distcp", b"an upload that was cut off")
    damage(tier, 200, name, flipped(tier, 200, name))
    assert [each.step for each in prune_tier(tier, 1, dry_run=True, progress=silent)] == [50]
    assert sorted(tier.stored()) == [50, 100, 200]  # the newest is damaged, so 100 stays
    prune_tier(tier, 1, dry_run=False, progress=silent)
    assert sorted(tier.stored()) == [100, 200]


def test_copies_from_and_to_a_url(tier: Tier, checkpoints: Path, tmp_path: Path) -> None:
    if "://" not in tier.url:
        return
    assert copy_anywhere(str(checkpoints / "step-00000100"), tier.url, progress=silent) == tier.address(100)
    with pytest.raises(UserError, match="exists already"):
        copy_anywhere(str(checkpoints / "step-00000100"), tier.url, progress=silent)
    copy = copy_anywhere(tier.address(100), str(tmp_path / "back"), progress=silent)
    assert read_manifest(Path(copy)) == read_manifest(checkpoints / "step-00000100")
    second = memory_url()
    assert copy_anywhere(tier.url, second, progress=silent) == f"{second}/checkpoints/step-00000100"
    with pytest.raises(UserError, match="no checkpoint"):
        copy_anywhere(memory_url(), str(tmp_path / "none"), progress=silent)
    damage(tier, 100, "state.json", b"{}")
    with pytest.raises(DamagedCheckpointError, match=r"state\.json was changed"):
        copy_anywhere(tier.url, str(tmp_path / "damaged"), progress=silent)
    assert not (tmp_path / "damaged").exists()


def test_the_cache_has_the_newest(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    tier = Tier(memory_url())
    tier.upload(checkpoints / "step-00000100", require_owner=NOBODY)
    first, _ = cached_checkpoint(tier.url, progress=silent)
    assert cached_checkpoint(tier.url, progress=silent)[0] == first
    tier.upload(checkpoints / "step-00000200", require_owner=NOBODY)
    second, _ = cached_checkpoint(tier.url, progress=silent)
    assert [each.name for each in second.parent.iterdir()] == ["step-00000200"]
    assert cached_checkpoint(tier.address(100), progress=silent)[0].name == "step-00000100"
    with pytest.raises(UserError, match="no checkpoint"):
        cached_checkpoint(tier.address(300), progress=silent)
    assert split_address(tier.address(100)) == (tier.url, 100)


def test_a_place_that_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nosuch://place"):
        Tier("nosuch://place")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://.*pip install s3fs"):
        Tier("s3://bucket/runs")


def test_a_killed_upload_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    """A process is killed before each of its acts on the disk in turn; what it left is looked at, and goes on."""
    program = Path(__file__).with_name("killed_uploads.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(program.parents[2]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-P", program, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    assert len(report) > 25
    assert {each["newer"] for each in report} == {False, True}  # the attempt before, until this one is there
    assert all(each["whole"] and each["after"] == [300] for each in report), report
    assert any(0 < each["sent_again"] < report[0]["sent_again"] for each in report)
