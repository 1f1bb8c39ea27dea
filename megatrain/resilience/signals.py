"""Signals that ask a run to stop.

While it trains the handler only sets a flag, and the loop saves at the next step boundary. Before, while there is
nothing to save, a signal ends the run at once.
"""

import os
import signal
import time
from types import FrameType, TracebackType

from megatrain.config.errors import StopRequested
from megatrain.runtime.stop_signals import STOP_SIGNALS, take_signals

STARTED = time.monotonic()
"""When this process started, but for the import of a few modules."""
SAME_REQUEST_S = 2.0
"""Signals that follow the first one so soon belong to the same request: a scheduler that signals every process of a
job reaches this one directly and by the launcher, and a closed terminal sends SIGHUP twice."""


class StopSignals:
    """Signal handlers that, while active, set `received` to the name of the first stop signal.

    They also raise `StopRequested`, until `defer` says that there is something to save. A second request ends the
    process at once, without saving. A SIGHUP that is ignored (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._raised: StopRequested | None = None
        self._received_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        take_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        stop = self.stop_behind(error)
        if stop is not None and stop is not error:
            raise stop from error

    def defer(self) -> None:
        """Set the flag only, from now on: the loop asks for it."""
        self._deferred = True

    def stop_behind(self, error: BaseException | None) -> StopRequested | None:
        """Return the request to stop that ended the start-up, also where `error` hides it.

        A signal interrupts any line, of a library's clean-up too, and what that raises then is no failure of the run.
        """
        if error is None or isinstance(error, StopRequested):
            return error
        return self._raised if not self._deferred else None

    def request(self, reason: str) -> None:
        """Ask for a stop as a signal would, for another reason."""
        self.received = self.received or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            self.request(signal.Signals(number).name)
            if not self._deferred:
                self._raised = StopRequested(signal.Signals(number).name)
                raise self._raised
        elif now - self._received_at > SAME_REQUEST_S:
            os._exit(128 + number)
