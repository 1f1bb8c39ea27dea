"""Disks that are full or read-only, and processes that are killed: never a good checkpoint lost, never a bad one."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from unit.checkpoint import killed_saves
from unit.checkpoint.samples import all_bits, make_tensors, targets_for, two_checkpoints

from megatrain.checkpoint import space
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.files import HashingWriter
from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import UserError

MIB = 1 << 20


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(self.path)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"a small disk can't be mounted here: {done.stderr.strip()}")

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None:
        pytest.skip("a small disk can't be mounted here: there is no mount command")
    path = tmp_path / "disk"
    path.mkdir()
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def fill(path: Path) -> None:
    """Not a page is left on the disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_seen_beforehand(disk: Disk) -> None:
    disk.mount("size=2m")
    checkpointer = two_checkpoints(disk.path)
    before = snapshot(disk.path)
    with pytest.raises(
        CheckpointSaveError, match=r"needs 4,2\d\d,\d\d\d bytes .*, but 1,\d\d\d,\d\d\d .*free"
    ):
        checkpointer.save(300, {"w": torch.zeros(MIB)}, {})
    assert snapshot(disk.path) == before


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_full_disk_gets_room_from_old_checkpoints(disk: Disk, on_error: str) -> None:
    """Those that would be deleted after the save go before it, if a failure does not end the run."""
    disk.mount("size=4m")
    tensors = {"w": torch.zeros(MIB // 4)}  # three fit
    for step in (1, 2, 3):
        Checkpointer(disk.path, CheckpointConfig(keep=3)).save(step, tensors, {})
    checkpointer = Checkpointer(disk.path, CheckpointConfig(keep=3, on_error=on_error))
    if on_error == "stop":
        with pytest.raises(CheckpointSaveError, match="bytes"):
            checkpointer.save(4, tensors, {})
        assert checkpointer.steps() == [1, 2, 3]
        return
    checkpointer.save(4, tensors, {})
    assert checkpointer.steps() == [2, 3, 4]
    with pytest.raises(CheckpointSaveError, match="bytes"):
        checkpointer.save(5, {"w": torch.zeros(MIB)}, {})  # does not fit whatever is deleted
    assert checkpointer.steps() == [3, 4]


@pytest.mark.parametrize("elements", [MIB, 200])
def test_a_disk_that_fills_up_meanwhile(disk: Disk, monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """What others write after the check is stood for by a check that saw more room than there is."""
    disk.mount("size=2m")
    checkpointer = two_checkpoints(disk.path)
    if elements == 200:
        fill(disk.path / "others")
    before = snapshot(disk.path)
    monkeypatch.setattr(space, "free_bytes", lambda path: 1 << 40)
    with pytest.raises(
        CheckpointSaveError, match=r"No space left on device.*Earlier checkpoints are untouched"
    ):
        checkpointer.save(300, {"w": torch.zeros(elements)}, {})
    assert snapshot(disk.path) == before
    assert not list(disk.path.glob(".tmp-*"))
    found = checkpointer.load(loaded := targets_for(make_tensors(200)))
    assert found is not None
    assert (found.step, found.warnings) == (200, ())
    assert all_bits(loaded) == all_bits(make_tensors(200))


@pytest.mark.parametrize("spare", range(6))
def test_a_disk_without_inodes(disk: Disk, spare: int) -> None:
    """Bytes are free, but only `spare` more files can be made: nothing that a check of free bytes can see."""
    disk.mount("size=4m,nr_inodes=30")
    checkpointer = two_checkpoints(disk.path)
    while (free := os.statvfs(disk.path).f_ffree) > spare:
        (disk.path / f"file{free}").touch()
    before = snapshot(disk.path)
    with pytest.raises(CheckpointSaveError, match="No space left on device"):  # a folder and five files
        checkpointer.save(300, make_tensors(300), {})
    assert snapshot(disk.path) == before
    assert os.statvfs(disk.path).f_ffree == spare
    assert checkpointer.steps() == [100, 200]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The limit of the process is hit in the middle of a tensor; torch reports another error, the system's is shown."""
    checkpointer = two_checkpoints(tmp_path)
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(CheckpointSaveError, match="File too large") as caught:
            checkpointer.save(300, {"w": torch.zeros(MIB)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert snapshot(tmp_path) == before


def test_a_failed_background_sync_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost write once, and the next fsync succeeds: the report has to count."""

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(CheckpointSaveError, match="Input/output error"):
        Checkpointer(tmp_path, CheckpointConfig()).save(1, {"w": torch.zeros(9 * MIB)}, {})
    assert os.listdir(tmp_path) == []
    writer = HashingWriter(tmp_path / "file")
    writer.write(bytes(20 * MIB))
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    assert writer.record is None


def test_a_read_only_disk(disk: Disk) -> None:
    disk.mount("size=4m")
    checkpointer = two_checkpoints(disk.path)
    os.truncate(disk.path / "step-00000200" / "state.json", 3)
    disk.read_only()
    with pytest.raises(CheckpointSaveError, match="Read-only file system"):
        checkpointer.save(300, make_tensors(300), {})
    with pytest.raises(UserError, match="Read-only file system"):
        checkpointer.preflight(make_tensors(300))
    found = checkpointer.load(targets_for(make_tensors(100)))  # reading goes on, past the damaged one
    assert found is not None
    assert found.step == 100
    assert "could not be moved" in found.warnings[0]


def test_a_directory_that_vanished_is_made_again(tmp_path: Path) -> None:
    checkpointer = two_checkpoints(tmp_path / "a" / "checkpoints")
    shutil.rmtree(tmp_path / "a")
    assert checkpointer.steps() == []
    checkpointer.save(300, make_tensors(300), {})
    assert checkpointer.steps() == [300]


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointSaveError, match=r"exists|Not a directory"):
        Checkpointer(tmp_path / "checkpoints", CheckpointConfig()).save(1, make_tensors(1), {})


def test_interrupting_a_save_stays_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch wraps it in an exception of its own, which would look like a failed save."""

    def interrupt(writer: HashingWriter, data: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(HashingWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Checkpointer(tmp_path, CheckpointConfig()).save(1, make_tensors(1), {})
    assert os.listdir(tmp_path) == []


def test_everything_is_on_the_disk_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill can't show this, only a power cut: so the order of the syncs is looked at."""
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    path = Checkpointer(tmp_path / "a" / "b", CheckpointConfig()).save(1, make_tensors(1), {})

    committed = log.index(("rename", str(path)))
    staging = next(Path(name).parent for _, name in log if name.endswith("manifest.json"))
    synced = [name for act, name in log[:committed] if act == "sync"]
    metadata_file = staging / ".metadata.tmp"  # torch renames it before the folder is synced
    expected = {str(staging / file.name) for file in path.iterdir() if file.name != ".metadata"}
    assert expected | {str(metadata_file)} <= set(synced)
    assert synced[-1] == str(staging)
    assert {str(tmp_path), str(tmp_path / "a")} <= set(synced)  # the new folders above it
    assert log[committed + 1] == ("sync", str(path.parent))
    assert len(log) == committed + 2


def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before each act on the disk: the old or the new checkpoint loads, whole, and the next save works."""
    tests = Path(killed_saves.__file__).parents[2]
    memory = Path(
        "/dev/shm"
    )  # a kill leaves the page cache alone, so that any file system will do: the fastest
    folder = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-P", killed_saves.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(line["right"] for line in report)
    steps = [line["step"] for line in report]
    committed = steps.index(300)
    assert set(steps[:committed]) == {200}
    assert set(steps[committed:]) == {300}  # never back
    assert committed > 20
    assert len(report) - committed > 10  # the points in the deletion of the two older ones
    assert all(line["after"] == ["step-00000300"] for line in report)
    assert any(".tmp-step-00000300-" in line["left"] for line in report)
    assert any(".trash-step-00000100-" in line["left"] for line in report)
