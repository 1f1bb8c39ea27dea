"""Saves during a training run: when one begins, what waits for it, and what follows from its failure.

With `checkpoint.async_save` training goes on while a thread writes what was copied at the step. There is one such save
at a time. Its collectives have a group of their own, since those of training go on meanwhile; all ranks deal with its
outcome at the same step.
"""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.staging import HostCopy, Stager
from megatrain.checkpoint.store import Checkpointer
from megatrain.runtime.priority import lower_priority
from megatrain.runtime.processes import Processes


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What became of a save, for the run's record."""

    outcome: Literal["saved", "failed", "skipped"]
    facts: dict[str, Any]
    notice: str = ""
    """What a person should know; empty: nothing."""


@dataclass(slots=True)
class _Job:
    """A save in the background."""

    step: int
    staged: HostCopy
    state: dict[str, Any]
    info: dict[str, Any]
    began: float
    stall_s: float = 0.0
    is_reported: bool = False
    thread: threading.Thread | None = None
    path: Path | None = None
    ended: float = 0.0
    error: Exception | None = None


class Saver:
    """Saves of a run through `checkpointer`, in the background if the config says so.

    All processes call `save` and `settle` together; `has_failed` and `reports` concern this one alone.
    """

    def __init__(self, checkpointer: Checkpointer, background: Processes) -> None:
        """Save through a copy of `checkpointer`.

        Args:
            background: the same processes as the checkpointer's, over a group that nothing else uses.
        """
        self.cfg = checkpointer.cfg
        self.processes = checkpointer.processes
        self._checkpointer = copy.copy(checkpointer)
        self._checkpointer.processes = background
        self._stager = Stager()
        self._job: _Job | None = None
        self._failures = 0  # of saves in the background since the last that has not failed
        self._reports: list[SaveReport] = []

    def save(
        self,
        step: int,
        tensors: Callable[[], dict[str, Tensor]],
        state: dict[str, Any],
        info: dict[str, Any],
        *,
        is_last: bool,
    ) -> float:
        """Save a checkpoint of `step`, or begin to; return how long training stood still for it, in seconds.

        The last save of a run is committed when this returns.

        Raises:
            CheckpointSaveError: this save failed, or an earlier one twice, and the config does not let training go on.
        """
        began = time.perf_counter()
        if not self.cfg.async_save or is_last:
            self._settle(superseded=True)
            self._save_now(step, tensors(), state, info, is_last=is_last)
            return time.perf_counter() - began
        if self.cfg.when_busy == "skip" and not all(self.processes.gather(self._is_idle())):
            busy = self._job.step if self._job is not None else None
            self._reports.append(SaveReport("skipped", {"step": step, "busy_with": busy}))
            return time.perf_counter() - began
        self._settle(superseded=True)
        job = _Job(step, self._stager.stage(tensors()), state, info, began)
        self._start(job)
        job.stall_s = time.perf_counter() - began
        return job.stall_s

    def has_failed(self) -> bool:
        """Tell whether a save in the background has failed here, so that all processes must `settle` it."""
        return self._job is not None and not self._is_running() and self._job.error is not None

    def settle(self) -> None:
        """Begin a failed save in the background once more, or give it up; do nothing if none has failed.

        Raises:
            CheckpointSaveError: it has failed twice, and the config does not let training go on.
        """
        if any(self.processes.gather(self.has_failed())):
            self._settle(superseded=False)

    def finish(self) -> None:
        """Wait for the save in the background; its failure counts as in `save`. All processes call this together."""
        self._settle(superseded=True)

    def abandon(self, wait_s: float) -> None:
        """Wait for the save in the background for at most `wait_s`, whatever becomes of it: the run has failed."""
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(wait_s)

    def reports(self) -> list[SaveReport]:
        """Return what became of the saves since the last call."""
        self._report_end()
        found, self._reports = self._reports, []
        return found

    def _save_now(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        info: dict[str, Any],
        *,
        is_last: bool,
    ) -> None:
        began = time.perf_counter()
        try:
            path = self._checkpointer.save(step, tensors, state, info)
        except CheckpointSaveError as error:
            if is_last or self.cfg.on_error == "stop":
                raise
            self._report_failure(step, error, "Training goes on without it.")
            return
        seconds = time.perf_counter() - began
        self._report_save(step, path, stall_s=seconds, total_s=seconds)

    def _start(self, job: _Job) -> None:
        self._job = job
        job.thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        job.thread.start()

    def _write(self, job: _Job) -> None:
        lower_priority()
        try:
            staged = job.staged
            job.path = self._checkpointer.save(
                job.step, staged.tensors, job.state, job.info, specs=staged.specs
            )
        except Exception as error:
            job.error = error
        job.ended = time.perf_counter()

    def _is_running(self) -> bool:
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    def _is_idle(self) -> bool:
        return not self._is_running()

    def _settle(self, *, superseded: bool) -> None:
        """Wait for the save in the background; if it has failed, begin it once more or give it up.

        Args:
            superseded: a later step is saved next, which is the second attempt of a failed save.
        """
        job = self._job
        if job is None or job.thread is None:
            return
        self.processes.agree(job.thread.join)
        self._report_end()
        self._job = None
        error = self.processes.agree(lambda: self._outcome(job))
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if self._failures == 1:
            self._report_failure(job.step, error, "It is tried once more.")
            if not superseded:
                job.error = None
                self._start(job)
            return
        self._failures = 0
        if self.cfg.on_error == "stop":
            raise error
        self._report_failure(job.step, error, "Training goes on without it.")

    def _outcome(self, job: _Job) -> CheckpointSaveError | None:
        """Return the failure of a save that may be tried again; raise any other error."""
        if job.error is None or isinstance(job.error, CheckpointSaveError):
            return job.error
        raise job.error

    def _report_end(self) -> None:
        job = self._job
        if job is None or self._is_running() or job.path is None or job.is_reported:
            return
        job.is_reported = True
        self._report_save(job.step, job.path, stall_s=job.stall_s, total_s=job.ended - job.began)

    def _report_save(self, step: int, path: Path, *, stall_s: float, total_s: float) -> None:
        facts = {"step": step, "path": path.name, "bytes": self._checkpointer.saved_bytes}
        facts |= {"stall_s": stall_s, "total_s": total_s}
        self._reports.append(SaveReport("saved", facts))

    def _report_failure(self, step: int, error: CheckpointSaveError, then: str) -> None:
        self._reports.append(
            SaveReport("failed", {"step": step, "error": str(error)}, notice=f"{error} {then}")
        )
