"""A stop signal raises a flag; a second one ends the process at once."""

import os
import signal
import subprocess
import sys

from megatrain.resilience.signals import StopSignals


def test_a_signal_is_recorded_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_leaves_at_once() -> None:
    program = (
        "import os, signal\n"
        "from megatrain.resilience.signals import StopSignals\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
