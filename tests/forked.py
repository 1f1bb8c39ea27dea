"""The command in a process that is forked from one that has imported torch, which takes most of a small run's seconds.

TEST_PLANT in its environment names a module to be imported first, which plants a fault.

Apart from that it is the process that a shell starts: command line, environment, folder, output, exit code. The ranks
of a layout are forked too.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from megatrain.runtime import launch
from megatrain.runtime.stop_signals import STOP_SIGNALS

LIMIT_S = 300.0
PRELOADED = ["megatrain.cli.train", "megatrain.train.main", "megatrain.train.export", "torch._dynamo"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


class Rank:
    """A process of a layout, with the methods of `subprocess.Popen` that its launcher uses."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            for number in STOP_SIGNALS:  # as a program starts
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            be(command[3:], env)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended and was waited for
            os.kill(self.pid, number)


def be(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be the command with these arguments, to the end of the process."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["megatrain", *argv]
    code: object = 1
    try:
        if plant := environment.get("TEST_PLANT"):
            import_module(plant)
        from megatrain.cli.main import main
        from megatrain.resilience import signals

        signals.STARTED = time.monotonic()
        code = main(list(argv))
    except SystemExit as end:  # of argparse
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def enter(cwd: str, outputs: Sequence[str]) -> None:
    """Go to a folder, and write to the files `outputs` in place of stdout and stderr."""
    os.chdir(cwd)
    for number, output in enumerate(outputs, 1):
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)


def _start(argv: Sequence[str], cwd: str, environment: Mapping[str, str], outputs: Sequence[str]) -> None:
    enter(cwd, outputs)
    launch.subprocess = SimpleNamespace(Popen=Rank)  # type: ignore[assignment]
    be(argv, environment)


class Forked:
    """A process that runs `megatrain` with the arguments `argv`, with what tests use of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> None:
        self.argv = list(argv)
        self._folder = tempfile.TemporaryDirectory(prefix="output-")
        self._outputs = [f"{self._folder.name}/stdout", f"{self._folder.name}/stderr"]
        for output in self._outputs:
            Path(output).touch()
        self._process = CONTEXT.Process(
            target=_start, args=(self.argv, str(cwd), dict(environment), self._outputs)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = LIMIT_S) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.argv, timeout, *self.said())
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> tuple[str, str]:
        """What it has printed, and to stderr."""
        out, err = (Path(output).read_text() for output in self._outputs)
        return out, err

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()


def run_forked(
    argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `megatrain` with the arguments `argv` to its end."""
    process = Forked(argv, cwd=cwd, environment=environment)
    try:
        said = process.communicate()
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.argv, process.returncode, *said)
