"""A process's side of its guard: starts it, tells it what goes on, and asks it why another process does not answer.

The guard is a process of its own, because it has to speak when this one can't: stopped, held by a call that keeps the
interpreter's lock, or killed.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megatrain.config.errors import StalledError
from megatrain.runtime.guard.record import Record

STACK_SIGNAL = signal.SIGURG
"""Makes this process write its threads' stacks; without a handler it is ignored."""
VERDICT_SIGNAL = signal.SIGVTALRM
"""Makes this process raise the verdict, wherever its main thread is."""
START_S = 20.0
"""How long the guard may take to start, on a busy machine."""
ANSWER_S = 8.0
"""How long a failed process waits for the verdict: longer than all ranks take to tell what they do."""
END_S = 5.0


class Guard:
    """The guard of this process. Its `record` is where the seam writes to."""

    def __init__(
        self, *, rank: int, size: int, local_rank: int, timeout_s: float, meeting: str | None
    ) -> None:
        """Start it.

        Args:
            timeout_s: how long nothing may stand still. meeting: the file over which processes of one machine meet.
        """
        self.record = Record()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        facts = {
            "rank": rank,
            "size": size,
            "local_rank": local_rank,
            "limit": timeout_s,
            "pid": os.getpid(),
            "meeting": meeting,
            "record": self.record.file,
            "stacks": self._stacks.fileno(),
            "path": sys.path,
        }
        start = "import json, sys; f = json.loads(sys.argv[1]); sys.path = f.pop('path'); "
        start += "from megatrain.runtime.guard.process import main; main(**f)"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", start, json.dumps(facts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self.record.file, self._stacks.fileno()),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._lock = threading.Lock()
        self._heard = b""
        self._verdict: str | None = None
        self._notices: list[dict[str, Any]] = []
        self._before: dict[int, Any] = {}
        self._register()

    def tell(self, message: dict[str, Any]) -> None:
        """Tell the guard something; it is lost if the guard is gone, or does not read."""
        with self._lock, contextlib.suppress(OSError):
            os.write(self._to, json.dumps(message).encode() + b"\n")

    def listen_at(self, address: str) -> dict[str, Any]:
        """Make this guard the one that all others report to; return what they must know for it (`report_to`).

        Args:
            address: of this host, as the others know it.
        """
        self.tell({"do": "listen", "address": address})
        return {"address": address, **(self._wait_for("port", START_S) or {"port": 0})}

    def report_to(self, where: dict[str, Any]) -> None:
        """Report to the guard of rank 0, which returned `where`."""
        if where["port"]:
            self.tell({"do": "report to", **where})

    def notices(self) -> list[dict[str, Any]]:
        """Return what the guard has found worth telling since the last call: slow ranks."""
        self._hear(0.0)
        found, self._notices = self._notices, []
        return found

    def explain(self, error: BaseException, *, is_of_others: bool) -> BaseException:
        """Report `error` to all; return what is behind it, if that is another process.

        Args:
            is_of_others: whether this process failed because another one did not answer, or may have.
        """
        is_verdict = isinstance(error, StalledError) and error.is_verdict
        self.tell({"do": "failed", "text": _text(error), "is_own": not (is_of_others or is_verdict)})
        if is_of_others and not is_verdict:
            if self._verdict is None:
                self._wait_for("verdict", ANSWER_S)
            if self._verdict is not None:
                return _verdict_error(self._verdict)
        return error

    def __enter__(self) -> "Guard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the guard; after an error it stays until this process has ended."""
        if kind is None or not issubclass(kind, Exception):
            self.tell({"do": "bye"})
            self._process.stdin.close()  # type: ignore[union-attr]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            for number, before in self._before.items():
                signal.signal(number, before)
            faulthandler.unregister(STACK_SIGNAL)
            self._process.stdout.close()  # type: ignore[union-attr]
        if self._process.returncode is None:
            self._process.returncode = 0  # it ends by itself, and nobody is to wait for it

    def _register(self) -> None:
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        if threading.current_thread() is threading.main_thread():
            self._before[VERDICT_SIGNAL] = signal.signal(VERDICT_SIGNAL, self._raise_verdict)

    def _raise_verdict(self, number: int, frame: FrameType | None) -> None:
        self._hear(0.0)
        if self._verdict is not None:
            raise _verdict_error(self._verdict)

    def _wait_for(self, kind: str, seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for message in self._hear(left):
                if kind in message:
                    return message
            if self._verdict is not None and kind == "verdict":
                return {"verdict": self._verdict}
            if self._process.poll() is not None:
                return None
        return None

    def _hear(self, seconds: float) -> list[dict[str, Any]]:
        """Return the messages that come within `seconds`, or are there."""
        try:
            if not select.select([self._from], [], [], seconds)[0]:
                return []
            self._heard += os.read(self._from, 1 << 16)
        except (OSError, ValueError):
            return []
        *lines, self._heard = self._heard.split(b"\n")
        messages: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for message in messages:
            if "verdict" in message:
                self._verdict = message["verdict"]
            elif "notice" in message:
                self._notices.append(message)
        return messages


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _verdict_error(text: str) -> StalledError:
    error = StalledError(text)
    error.is_verdict = True
    return error
