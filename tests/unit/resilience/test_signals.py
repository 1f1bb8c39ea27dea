"""A stop signal raises a flag; a second request ends the process at once."""

import os
import signal
import subprocess
import sys

import pytest

from megatrain.config.errors import StopRequested
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.stop_signals import held_back, take_signals


def test_a_signal_is_recorded_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        signals.defer()
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_until_there_is_something_to_save_a_signal_ends_the_run() -> None:
    with StopSignals() as signals:
        with pytest.raises(StopRequested, match="stopped by SIGHUP before the first step"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == "SIGHUP"


def terminated(then_fails: bool, *, deferred: bool) -> None:
    """Get SIGTERM, in a block whose clean-up may fail because of it."""
    with StopSignals() as signals:
        if deferred:
            signals.defer()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            if then_fails:
                raise AttributeError("what the clean-up needs is not there yet")


def test_what_a_library_raises_because_of_a_signal_does_not_hide_it() -> None:
    with pytest.raises(StopRequested, match="stopped by SIGTERM"):
        terminated(then_fails=True, deferred=False)


def test_a_failure_after_a_deferred_signal_stays_one() -> None:
    terminated(then_fails=False, deferred=True)
    with pytest.raises(AttributeError):
        terminated(then_fails=True, deferred=True)


def test_another_reason_to_stop_does_not_make_a_signal_the_second_one() -> None:
    with StopSignals() as signals:
        signals.defer()
        signals.request("time budget")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "time budget"


def test_signals_held_back_by_the_launcher_are_taken_when_the_handlers_stand() -> None:
    program = (
        "import sys, time\n"
        "print('up', flush=True)\n"
        "sys.stdin.readline()\n"
        "from megatrain.resilience.signals import StopSignals\n"
        "with StopSignals() as found:\n"
        "    pass\n"
    )
    with held_back():
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGUSR2)
    _, said = child.communicate("\n", timeout=60)
    assert child.returncode == 1  # the exception, which nothing catches here
    assert "StopRequested" in said
    take_signals()


def ended(wait: str) -> subprocess.CompletedProcess[str]:
    """The end of a process that gets SIGTERM and, after `wait`, SIGHUP."""
    program = (
        "import os, signal, time\n"
        "from megatrain.resilience import signals\n"
        "with signals.StopSignals() as found:\n"
        "    found.defer()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    {wait}\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(found.received)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_second_request_leaves_at_once() -> None:
    done = ended("signals.SAME_REQUEST_S = -1.0")
    assert (done.returncode, done.stdout) == (128 + signal.SIGHUP, "")


def test_signals_in_a_row_are_one_request() -> None:
    done = ended("pass")
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n")


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_programs_started_while_signals_are_held_back_do_not_take_them() -> None:
    """As the compilers of torch.compile: a signal to the whole group reaches them too."""
    with StopSignals() as signals:
        signals.defer()
        with held_back():
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0)
            os.killpg(child.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            child.communicate(timeout=60)
        assert (child.returncode, signals.received) == (0, "SIGTERM")
