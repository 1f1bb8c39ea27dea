"""One node's script on every host, over ssh; when one host ends, all do."""

import contextlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from megatrain.launch.config import SshCluster
from megatrain.launch.record import read_status
from megatrain.launch.torchrun import outcome

OPTIONS = (
    "-oBatchMode=yes",  # no question about passwords or keys, which nobody would answer
    "-oServerAliveInterval=15",  # a host that is gone is noticed ...
    "-oServerAliveCountMax=4",  # ... after a minute
    "-T",  # no terminal: lines stay as they are
)
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
AFTER_GRACE_S = 15
"""Seconds after the hosts' own grace until their connections are cut."""


class Host:
    """The script on one host."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start it. A session of its own keeps the terminal's Ctrl-C from ssh, which would end without it."""
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ask_to_stop(self) -> None:
        """Ask the run there to save and end."""
        with contextlib.suppress(OSError, ValueError):  # it has ended
            assert self.process.stdin is not None
            self.process.stdin.write(b"TERM\n")
            self.process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Yield what it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode(errors="replace").rstrip("\n")


def commands(cluster: SshCluster, guard: Path, script: str) -> dict[str, list[str]]:
    """Return host -> the command line that runs `script` there as the node of its number.

    Args:
        guard: `launchers/ssh/guard.sh`.
    """
    found = {}
    for rank, host in enumerate(cluster.host_names):
        words = [
            "bash",
            "-c",
            guard.read_text(),
            "guard",
            f"NODE_RANK={rank}\n{script}",
            str(cluster.grace_s),
        ]
        found[host] = ["ssh", *OPTIONS, *cluster.ssh, host, shlex.join(words)]
    return found


def run_hosts(
    lines: dict[str, list[str]], directory: Path, grace_s: float, say: Callable[[str], None]
) -> int:
    """Run a command for each host until all have ended; return the exit code of the run in `directory` if it is known.

    When one ends, the others have `grace_s` to end as well. Signals that ask to stop are passed on to all.

    Args:
        say: takes in each line, with the name of its host.
    """
    before = read_status(directory)
    hosts: list[Host] = []
    asked = threading.Event()

    def ask_all(number: int, frame: FrameType | None) -> None:
        asked.set()
        for host in hosts:
            host.ask_to_stop()

    previous = {number: signal.signal(number, ask_all) for number in STOP}
    try:
        width = max(map(len, lines))
        for name, command in lines.items():
            hosts.append(Host(name, command))
        code = _look_after(hosts, grace_s, lambda host, line: say(f"[{host.name:<{width}}] {line}"))
    finally:
        for host in hosts:
            host.process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return outcome(code, directory, attempt=before.attempt if before else 0)


def _look_after(hosts: list[Host], grace_s: float, say: Callable[[Host, str], None]) -> int:
    """Repeat what the hosts print, and end all when one has failed; return the first code that is not 0."""
    events: queue.Queue[tuple[Host, str | None]] = queue.Queue()
    for host in hosts:
        threading.Thread(target=_read, args=(host, events), daemon=True).start()
    running, first, deadline = len(hosts), 0, float("inf")
    while running:
        try:
            host, line = events.get(
                timeout=None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
            )
        except queue.Empty:
            for each in hosts:
                if each.process.poll() is None:
                    say(each, f"did not end within {grace_s:g} s and is cut off")
                each.process.kill()
            deadline = float("inf")
            continue
        if line is not None:
            say(host, line)
            continue
        running -= 1
        code = host.process.wait()
        say(host, f"ended with exit code {code}")
        first = first or code
        if running and deadline == float("inf"):
            deadline = time.monotonic() + grace_s + AFTER_GRACE_S
            if code:
                for each in hosts:
                    each.ask_to_stop()
    return first


def _read(host: Host, events: "queue.Queue[tuple[Host, str | None]]") -> None:
    for line in host.lines():
        events.put((host, line))
    events.put((host, None))


def print_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True, file=sys.stdout)
