"""Saves in the background: their content, their order, and what follows from their failures."""

import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from unit.checkpoint.samples import make_tensors

from megatrain.checkpoint import store
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import Checkpointer
from megatrain.runtime.processes import Processes

ASYNC = {"keep": 0, "async_save": True}


def saver_in(directory: Path, **options: Any) -> Saver:
    return Saver(Checkpointer(directory, CheckpointConfig(**ASYNC | options)), Processes())


def save(
    saver: Saver, step: int, tensors: dict[str, Tensor] | None = None, *, is_last: bool = False
) -> float:
    found = make_tensors(step) if tensors is None else tensors
    return saver.save(step, lambda: found, {"step": step}, {}, is_last=is_last)


def wait_until_failed(saver: Saver) -> None:
    saver.abandon(60)
    assert saver.has_failed()


def events(saver: Saver) -> list[tuple[str, int]]:
    return [(report.outcome, report.facts["step"]) for report in saver.reports()]


class Disk:
    """Saves that wait at a gate, or fail as often as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures = 0
        write = store.write_tensors

        def gated(directory: Path, tensors: dict[str, Tensor], *others: Any) -> Any:
            assert self.gate.wait(60)
            if self.failures:
                self.failures -= 1
                raise OSError(28, "No space left on device")
            return write(directory, tensors, *others)

        monkeypatch.setattr(store, "write_tensors", gated)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def files(checkpoint: Path) -> dict[str, bytes]:
    """All but the manifest, which has the time of the save."""
    return {f.name: f.read_bytes() for f in checkpoint.iterdir() if f.name != "manifest.json"}


def test_the_checkpoint_is_of_its_step_though_training_goes_on(tmp_path: Path, disk: Disk) -> None:
    saver, tensors = saver_in(tmp_path / "async"), make_tensors(1)
    disk.gate.clear()
    save(saver, 1, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert events(saver) == []
    disk.gate.set()
    save(saver, 2, is_last=True)
    assert events(saver) == [("saved", 1), ("saved", 2)]
    for step in (1, 2):
        Checkpointer(tmp_path / "sync", CheckpointConfig(keep=0)).save(
            step, make_tensors(step), {"step": step}
        )
        name = f"step-{step:08d}"
        assert files(tmp_path / "async" / name) == files(tmp_path / "sync" / name)


def test_the_next_save_waits_and_its_stall_is_told(tmp_path: Path, disk: Disk) -> None:
    saver = saver_in(tmp_path)
    disk.gate.clear()
    save(saver, 1)
    threading.Timer(0.2, disk.gate.set).start()
    stall = save(saver, 2)
    save(saver, 3, is_last=True)
    first, second, third = (report.facts for report in saver.reports())
    assert [first["step"], second["step"], third["step"]] == [1, 2, 3]
    assert second["stall_s"] == stall >= 0.1
    assert first["stall_s"] < 0.1 < first["total_s"]
    assert third["stall_s"] == third["total_s"]
    sizes = sum(f.stat().st_size for f in (tmp_path / "step-00000002").iterdir() if f.name != "manifest.json")
    assert second["bytes"] == sizes


def test_the_next_save_is_skipped(tmp_path: Path, disk: Disk) -> None:
    saver = saver_in(tmp_path, when_busy="skip")
    disk.gate.clear()
    save(saver, 1)
    save(saver, 2)
    disk.gate.set()
    saver.abandon(60)
    save(saver, 3)
    save(saver, 4, is_last=True)
    assert Checkpointer(tmp_path, CheckpointConfig()).steps() == [1, 3, 4]
    assert events(saver) == [("skipped", 2), ("saved", 1), ("saved", 3), ("saved", 4)]


def test_a_failed_save_is_tried_once_more_with_the_values_of_its_step(tmp_path: Path, disk: Disk) -> None:
    saver, tensors = saver_in(tmp_path / "async"), make_tensors(1)
    disk.failures = 1
    save(saver, 1, tensors)
    tensors["optim.step"].zero_()
    wait_until_failed(saver)
    saver.settle()
    saver.abandon(60)
    saver.settle()
    assert events(saver) == [("failed", 1), ("saved", 1)]
    Checkpointer(tmp_path / "sync", CheckpointConfig()).save(1, make_tensors(1), {"step": 1})
    assert files(tmp_path / "async" / "step-00000001") == files(tmp_path / "sync" / "step-00000001")


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_save_that_fails_twice(tmp_path: Path, disk: Disk, on_error: str) -> None:
    saver = saver_in(tmp_path, on_error=on_error)
    save(saver, 1)
    saver.abandon(60)
    disk.failures = 3
    save(saver, 2)
    wait_until_failed(saver)
    saver.settle()
    wait_until_failed(saver)
    if on_error == "stop":
        with pytest.raises(CheckpointSaveError, match="No space left"):
            saver.settle()
    else:
        saver.settle()
        assert events(saver) == [("saved", 1), ("failed", 2), ("failed", 2)]
        with pytest.raises(CheckpointSaveError, match="No space left"):
            save(saver, 3, is_last=True)
    assert Checkpointer(tmp_path, CheckpointConfig()).steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_next_save_is_the_second_attempt(tmp_path: Path, disk: Disk) -> None:
    saver = saver_in(tmp_path)
    disk.failures = 1
    save(saver, 1)
    saver.abandon(60)
    save(saver, 2)
    save(saver, 3, is_last=True)
    assert events(saver) == [("failed", 1), ("saved", 2), ("saved", 3)]


def test_a_synchronous_failure_is_a_notice_if_the_config_says_so(tmp_path: Path, disk: Disk) -> None:
    saver = saver_in(tmp_path, async_save=False, on_error="warn")
    disk.failures = 1
    save(saver, 1)
    (report,) = saver.reports()
    assert (report.outcome, report.facts["step"]) == ("failed", 1)
    assert "Training goes on without it" in report.notice
    disk.failures = 1
    with pytest.raises(CheckpointSaveError):
        save(saver, 2, is_last=True)
    save(saver_in(tmp_path, async_save=False), 3)
    disk.failures = 1
    with pytest.raises(CheckpointSaveError):
        save(saver_in(tmp_path, async_save=False), 4)


def test_another_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("not the owner any more")

    saver = saver_in(tmp_path, on_error="warn")
    monkeypatch.setattr(Checkpointer, "_commit", fails)
    save(saver, 1)
    wait_until_failed(saver)
    with pytest.raises(RuntimeError, match="not the owner"):
        saver.settle()
