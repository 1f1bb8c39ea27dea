"""Stop signals that come before a process has handlers for them."""

import subprocess
import sys

import pytest

CODE = """
import os, signal, sys
from megatrain.runtime.stop_signals import take_signals

number = getattr(signal, sys.argv[1])
taken = []
take_signals()
os.kill(os.getpid(), number)
signal.signal(number, lambda number, frame: taken.append(number))
take_signals()
print(taken == [number])
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_what_a_launch_script_ignores_is_kept_until_there_is_a_handler(name: str) -> None:
    number = name.removeprefix("SIG")
    script = f'trap "" {number}; exec "$@"'
    call = ["bash", "-c", script, "task", sys.executable, "-c", CODE, name]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
