"""Signals that ask a run to stop, and how they are kept for later."""

import contextlib
import signal
from collections.abc import Iterator

STOP_SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Take no stop signal until the end of the block; the processes that are started inside take none either.

    Those of this project take them from `take_signals` on, when their handlers stand.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_signals() -> None:
    """Take the stop signals that came while the launcher of this process held them back, and later ones at once.

    Launch scripts have SIGUSR1 and SIGUSR2 ignored, of which torchrun would die. A process that has no handler for them
    yet holds them back until it has one; then it calls this again.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
            signal.signal(number, signal.SIG_DFL)  # the system drops a signal that is ignored
