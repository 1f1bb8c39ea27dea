"""Uploads of a run's checkpoints to its durable tier, while training goes on.

The process that commits checkpoints uploads them too, in a thread, one at a time and the newest first. A failure never
stops training: the checkpoint is on the disk, and is tried again with the next one and at the end of the run.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.listing import CHECKPOINTS
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.retention import EVAL_LOSS, committed_steps, retained, step_name
from megatrain.checkpoint.tier import Tier
from megatrain.config.errors import UserError
from megatrain.runtime.ownership import StaleOwnerError
from megatrain.runtime.priority import lower_priority

TICK_S = 0.2
"""Seconds between two reports of progress at the end of a run."""


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What became of an upload, for the run's record."""

    event: Literal["upload", "upload_failed", "upload_skipped"]
    facts: dict[str, Any]
    notice: str = ""
    """What a person should know; empty: nothing."""


class Uploader:
    """Uploads from the directory of a run to `tier`, by one thread that lives as long as there is something to do."""

    def __init__(
        self,
        tier: Tier,
        run: Path,
        cfg: CheckpointConfig,
        *,
        records: Callable[[], list[Path]],
        require_owner: Callable[[], None],
    ) -> None:
        """Prepare to upload; nothing is sent yet.

        Args:
            records: returns the files of the run that are copied beside the checkpoints.
            require_owner: raises if the run or its tier belongs to another process.
        """
        self.tier = tier
        self._run = run
        self._cfg = cfg
        self._records = records
        self._require_owner = require_owner
        self._sent_records: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._pending: set[int] = set()
        self._current: int | None = None
        self._failed: dict[int, Exception] = {}
        self._thread: threading.Thread | None = None
        self._reports: list[UploadReport] = []
        self._stale: StaleOwnerError | None = None
        self._sent = 0

    def submit(self, *steps: int) -> None:
        """Upload the checkpoints of `steps`, and those whose upload has failed."""
        with self._lock:
            if self._stale is not None:
                return
            self._pending |= {*steps, *self._failed}
            self._failed.clear()
            if self._thread is None and self._pending:
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()

    def in_use(self) -> set[int]:
        """Return the step whose files are being read, which must not be deleted."""
        with self._lock:
            return set() if self._current is None else {self._current}

    def reports(self) -> list[UploadReport]:
        """Return what became of uploads since the last call.

        Raises:
            StaleOwnerError: the run goes on elsewhere.
        """
        with self._lock:
            if self._stale is not None:
                raise self._stale
            found, self._reports = self._reports, []
            return found

    def finish(self, progress: Callable[[str, float], None]) -> dict[int, Exception]:
        """Wait until all is uploaded, trying what has failed once more; return what failed again: step -> error."""
        for attempt in range(2):
            if attempt:
                self.submit()
            while (thread := self._thread) is not None:
                thread.join(TICK_S)
                self._show(progress)
            if not self._failed:
                break
        return dict(self._failed)

    def copy_records(self) -> None:
        """Copy the run's records once more, when no upload is under way; a failure is no loss of a checkpoint."""
        with contextlib.suppress(Exception):  # every backend has errors of its own
            self._put_records()

    def abandon(self, wait_s: float) -> None:
        """Wait for the upload for at most `wait_s`, whatever becomes of it: the run has failed."""
        if (thread := self._thread) is not None:
            thread.join(wait_s)

    def _show(self, progress: Callable[[str, float], None]) -> None:
        step = self._current
        if step is None:
            return
        with contextlib.suppress(CorruptCheckpointError, UserError, OSError):
            manifest = read_manifest(self._place(step))
            total = sum(record.size for record in manifest.files.values()) or 1
            progress(f"uploading {step_name(step)}", min(self._sent / total, 1.0))

    def _work(self) -> None:
        lower_priority()
        while True:
            with self._lock:
                self._current = max(self._pending, default=None)
                if self._current is None:
                    self._thread = None
                    return
                self._pending.discard(self._current)
                self._sent = 0
            self._upload(self._current)

    def _upload(self, step: int) -> None:
        began, path = time.perf_counter(), self._place(step)
        try:
            self._require_owner()
            self._put_records()  # before the checkpoint, whose use needs config and tokenizer
            sent = self.tier.upload(path, require_owner=self._require_owner, seen=self._see)
            self._put_records()
            self._prune(step)
        except StaleOwnerError as error:
            with self._lock:
                self._stale = error
                self._pending.clear()
        except Exception as error:  # every backend has errors of its own
            self._take_failure(step, error)
        else:
            facts = {"step": step, "url": self.tier.address(step), "bytes": sent}
            self._report("upload", facts | {"total_s": time.perf_counter() - began})

    def _take_failure(self, step: int, error: Exception) -> None:
        if not os.path.lexists(self._place(step)):
            self._report("upload_skipped", {"step": step, "reason": "it was deleted before its turn came"})
            return
        if isinstance(error, CorruptCheckpointError):
            text = f"{self._place(step)} is damaged ({error}), so it is not uploaded."
            self._report("upload_skipped", {"step": step, "reason": str(error)}, text)
            return
        with self._lock:
            self._failed[step] = error
        said = f"{type(error).__name__}: {error}"
        text = f"{step_name(step)} was not uploaded to {self.tier.url} ({said}). It is tried again with the next one."
        self._report("upload_failed", {"step": step, "error": said}, text)

    def _report(
        self,
        event: Literal["upload", "upload_failed", "upload_skipped"],
        facts: dict[str, Any],
        text: str = "",
    ) -> None:
        with self._lock:
            self._reports.append(UploadReport(event, facts, text))

    def _see(self, size: int) -> None:
        self._sent += size  # a display's figure: two threads may lose a piece

    def _put_records(self) -> None:
        """Copy the run's records that have changed since they were copied last."""
        for path in self._records():
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._sent_records.get(path) != stamp:
                self._require_owner()
                self.tier.put(path.relative_to(self._run).as_posix(), path.read_bytes())
                self._sent_records[path] = stamp

    def _prune(self, step: int) -> None:
        """Delete what the tier does not keep, and drop waiting checkpoints that it would not keep either."""
        with self._lock:
            waiting = set(self._pending) | set(self._failed)
        self.tier.prune(self._cfg, require_owner=self._require_owner, spare=waiting)
        dropped = waiting - wanted_steps({*self.tier.steps()}, waiting, self._run, self._cfg)
        with self._lock:
            self._pending -= dropped
            for each in dropped:
                self._failed.pop(each, None)

    def _place(self, step: int) -> Path:
        return self._run / CHECKPOINTS / step_name(step)


def wanted_steps(stored: set[int], local: set[int], run: Path, cfg: CheckpointConfig) -> set[int]:
    """Return those of the `local` steps that a tier with the checkpoints `stored` lacks, and would keep."""
    losses: dict[int, float] = {}
    for step in local:
        with contextlib.suppress(CorruptCheckpointError, UserError, OSError):
            loss = read_manifest(run / CHECKPOINTS / step_name(step)).info.get(EVAL_LOSS)
            if isinstance(loss, int | float):
                losses[step] = loss
    return (retained(stored | local, losses, cfg) & local) - stored


def waiting_steps(tier: Tier, run: Path, cfg: CheckpointConfig) -> set[int]:
    """Return the committed checkpoints of a run that its tier lacks, and would keep.

    Raises:
        UserError: the tier can't be reached.
    """
    return wanted_steps({*tier.steps()}, {*committed_steps(run / CHECKPOINTS)}, run, cfg)
