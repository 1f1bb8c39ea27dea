"""Signals that ask a run to stop. The handler only sets a flag; the loop saves at the next step boundary."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 2.0
"""Signals that follow the first one so soon belong to the same request: a scheduler that signals every process of a
job reaches this one directly and by the launcher, and a closed terminal sends SIGHUP twice."""


class StopSignals:
    """Signal handlers that, while active, set `received` to the name of the first stop signal.

    A second request ends the process at once, without saving. A SIGHUP that is ignored (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Take no stop signal until the end of the block, nor let programs take one that are started inside.

        A signal to the whole process group would otherwise end the compiler that torch.compile has started, and with
        it the run.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > SAME_REQUEST_S:
            os._exit(128 + number)
