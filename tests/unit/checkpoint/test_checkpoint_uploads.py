"""Uploads run beside training: one at a time, tried again when they fail, and over when the run ends."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.checkpoint.samples import make_tensors
from unit.checkpoint.tiers import FaultyFileSystem, faulty_url, memory_url

from megatrain.checkpoint import uploads
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.checkpoint.tier import Tier
from megatrain.checkpoint.uploads import Uploader, waiting_steps
from megatrain.runtime.ownership import StaleOwnerError


def silent(phase: str, fraction: float) -> None: ...


class Scene:
    """A run that saves and uploads, as training does it."""

    def __init__(
        self, run: Path, tier: Tier, require_owner: Callable[[], None] = lambda: None, **cfg: Any
    ) -> None:
        self.tier = tier
        self.cfg = CheckpointConfig(**cfg)
        self.checkpointer = Checkpointer(run / "checkpoints", self.cfg)
        self.record = run / "metrics.jsonl"
        run.mkdir(exist_ok=True)
        self.uploader = Uploader(
            tier, run, self.cfg, records=lambda: [self.record], require_owner=require_owner
        )
        self.checkpointer.on_commit = self.uploader.submit
        self.checkpointer.in_use = self.uploader.in_use

    def save(self, step: int) -> None:
        self.record.write_text(f"up to {step}\n")
        self.checkpointer.save(step, {"model.w": make_tensors(step)["model.layers.0.w"]}, {"step": step})


def test_each_checkpoint_is_there_at_the_end_with_the_records(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run", Tier(memory_url()), keep=2)
    for step in (10, 20, 30):
        scene.save(step)
    assert scene.uploader.finish(silent) == {}
    assert scene.tier.steps() == [20, 30]
    assert scene.tier.read("metrics.jsonl") == b"up to 30\n"
    reports = scene.uploader.reports()
    assert 30 in [each.facts["step"] for each in reports if each.event == "upload"]
    assert scene.uploader.reports() == []


def test_a_failure_is_told_and_tried_again_with_the_next(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run", Tier(faulty_url()), keep=0)
    FaultyFileSystem.failures = 1
    scene.save(10)
    scene.uploader.abandon(60)
    (report,) = scene.uploader.reports()
    assert (report.event, report.facts["step"]) == ("upload_failed", 10)
    assert "the store is away" in report.notice
    assert scene.tier.steps() == []
    scene.save(20)
    assert scene.uploader.finish(silent) == {}
    assert scene.tier.steps() == [10, 20]


def test_the_end_tries_twice_and_says_what_is_missing(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run", Tier(faulty_url()), keep=0)
    FaultyFileSystem.failures = 10**6
    scene.save(10)
    failed = scene.uploader.finish(silent)
    assert list(failed) == [10]
    assert [each.event for each in scene.uploader.reports()] == ["upload_failed"] * 2
    FaultyFileSystem.failures = 0
    assert waiting_steps(scene.tier, tmp_path / "run", scene.cfg) == {10}
    later = Scene(tmp_path / "run", scene.tier, keep=0)  # the run is started again
    later.uploader.submit(10)
    assert later.uploader.finish(silent) == {}
    assert later.tier.steps() == [10]


def test_a_checkpoint_under_way_is_not_deleted_and_one_that_waits_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()
    original = Tier.upload

    def slow(tier: Tier, source: Path, **options: Any) -> int:
        entered.set()
        assert released.wait(60)
        return original(tier, source, **options)

    monkeypatch.setattr(uploads.Tier, "upload", slow)
    scene = Scene(tmp_path / "run", Tier(memory_url()), keep=1)
    scene.save(10)
    assert entered.wait(60)
    for step in (20, 30):
        scene.save(step)
    assert scene.checkpointer.steps() == [
        10,
        30,
    ]  # keep=1, but 10 is being read; 20 was deleted before its turn
    released.set()
    assert scene.uploader.finish(silent) == {}
    assert scene.tier.steps() == [30]
    skipped = [each.facts["step"] for each in scene.uploader.reports() if each.event == "upload_skipped"]
    assert skipped in ([20], [])  # or dropped, since the tier would not keep it


def test_who_is_no_longer_the_owner_stops(tmp_path: Path) -> None:
    owned = [True]

    def require() -> None:
        if not owned[0]:
            raise StaleOwnerError("the run belongs to another process")

    scene = Scene(tmp_path / "run", Tier(memory_url()), require, keep=0)
    scene.save(10)
    scene.uploader.finish(silent)
    owned[0] = False
    scene.save(20)
    scene.uploader.finish(silent)
    assert scene.tier.steps() == [10]
    with pytest.raises(StaleOwnerError):
        scene.uploader.reports()
    scene.save(30)
    assert scene.tier.steps() == [10]


def test_what_the_tier_would_not_keep_is_not_uploaded(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run", Tier(memory_url()), keep=0)
    scene.checkpointer.on_commit = lambda step: None
    for step in (10, 20, 30, 40):
        scene.save(step)
    few = CheckpointConfig(keep=1, keep_every=20)
    assert waiting_steps(scene.tier, tmp_path / "run", few) == {20, 40}
