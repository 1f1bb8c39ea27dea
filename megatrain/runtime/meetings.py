"""Points that all processes of a run reach, and how long they wait there for one another."""

import contextlib
import threading
import time
from datetime import timedelta

from torch import distributed as dist

from megatrain.config.errors import StalledError, StopRequested
from megatrain.runtime.guard.seam import Seam

SHOWN = 8
"""Ranks that a message names at most."""
PART_S = 3.0
EVERY_S = 1.0
"""Signs of life are sent at most so often."""


class Meetings:
    """Meetings of `size` processes at `store`, numbered in the order in which all of them come.

    Who is there waits as long as any process gives signs of work (`report`), and for `timeout_s` after the last one: so
    a long preparation has the time that it needs, but no wait is endless.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        seam: Seam | None = None,
        name: str = "meetings",
    ) -> None:
        self.timeout_s = timeout_s
        self.seam = seam
        self._name = name
        self._store = dist.PrefixStore("meetings", store)
        self._rank, self._size = rank, size
        self._number = 0
        self._reported = 0.0
        self._lock = threading.Lock()

    def beside(self, name: str) -> "Meetings":
        """Return other meetings of the same processes, for another thread: a store's client serves one at a time."""
        store = dist.PrefixStore(name, self._store.clone())  # type: ignore[attr-defined]
        name = f"meetings of {name}"
        return Meetings(store, self._rank, self._size, timeout_s=self.timeout_s, seam=self.seam, name=name)

    def report(self) -> None:
        """Tell those that wait that this process is at work. Any thread may."""
        self._touch()
        with self._lock:
            if time.monotonic() - self._reported >= EVERY_S:
                self._reported = time.monotonic()
                self._store.add("signs", 1)

    def wait(self) -> None:
        """Wait until all processes have come.

        Raises:
            StalledError: one of them has failed, or none gave a sign for `timeout_s`.
        """
        if self.seam is None:
            self._wait()
            return
        self.seam.met(self._name, list(range(self._size)))
        try:
            self._wait()
        except StalledError as error:
            self.seam.failure = error
            raise
        self.seam.record.waited()

    def _wait(self) -> None:
        self._number += 1
        number = self._number
        self._store.set(f"place {self._rank}", str(number))
        if self._store.add(f"came {number}", 1) == self._size:
            self._store.set(f"all {number}", "")
        signs, since = self._signs(), time.monotonic()
        while not self._is_over(number):
            now = self._signs()
            if now != signs:
                signs, since = now, time.monotonic()
                self._touch()
            elif time.monotonic() - since >= self.timeout_s:
                raise StalledError(self._who_is_missing())

    def leave(self, stopped_by: str = "") -> None:
        """Tell the others, now and at the next meeting, not to wait for this process.

        Args:
            stopped_by: the signal that has stopped it; empty: it has failed.
        """
        with contextlib.suppress(dist.DistError):
            self._store.set("left", f"{self._rank} {stopped_by}")
            self._store.set(f"all {self._number + 1}", "")

    def _is_over(self, number: int) -> bool:
        """Wait for a part of `timeout_s`: seconds, since a thousand processes wait at one store.

        Signals are heard after each such part only.
        """
        try:
            self._store.wait([f"all {number}"], timedelta(seconds=min(PART_S, self.timeout_s / 4)))
        except RuntimeError as error:  # that of a file's store has no class of its own
            if "timeout" in str(error).lower():
                return False
            raise
        if self._store.check(["left"]):
            rank, _, stopped_by = self._store.get("left").decode().partition(" ")
            if stopped_by:
                raise StopRequested(stopped_by)
            raise StalledError(f"Process {rank} of {self._size} has failed; its own message says why.")
        return True

    def _touch(self) -> None:
        if self.seam is not None:
            self.seam.record.touch()

    def _signs(self) -> int:
        return int(self._store.add("signs", 0))

    def _who_is_missing(self) -> str:
        places = (self._place(rank) for rank in range(self._size))
        missing = [str(rank) for rank, place in enumerate(places) if place < self._number]
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        return (
            f"Process{'es' * (len(missing) > 1)} {shown} of {self._size} gave no sign of work for {self.timeout_s:g} s "
            "(resilience.timeout_s), while others waited: hung, or its machine, network or file system is. What was "
            "saved stays; start again to go on from it."
        )

    def _place(self, rank: int) -> int:
        key = f"place {rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0
