"""Hosts on this machine: network namespaces on a bridge, each with an address, a name and a link (root, Linux).

The namespaces are named after this process, so several sets can exist; leaving the context ends whatever runs in them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

NETWORK = "10.77.0"
"""The first three numbers of the hosts' addresses, seen inside the namespaces only."""


def can_make_hosts() -> bool:
    """Return whether this process may make namespaces and links between them."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"mtprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        bridge = ["ip", "-n", name, "link", "add", "br0", "type", "bridge"]
        made = subprocess.run(bridge, capture_output=True, check=False).returncode == 0
        _ip("netns", "del", name)
    return made


class Hosts:
    """`count` hosts, h1, h2 and so on. Use as a context manager."""

    def __init__(self, count: int) -> None:
        self.names = [f"h{n}" for n in range(1, count + 1)]
        self._prefix = f"mt{os.getpid()}"
        self._switch = f"{self._prefix}sw"
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def address(self, host: str) -> str:
        """Return the address of a host."""
        return f"{NETWORK}.{host.removeprefix('h')}"

    def start(
        self, host: str, command: Sequence[str], *, cwd: Path, env: dict[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        words = ["ip", "netns", "exec", self._space(host), "unshare", "--uts", "sh", "-c"]
        words += ['hostname "$0"; exec "$@"', host, *command]
        env = env | {"GLOO_SOCKET_IFNAME": "eth0"}
        process = subprocess.Popen(words, cwd=cwd, env=env, stdout=output, stderr=output)
        self._started.append(process)
        return process

    def cut(self, host: str) -> None:
        """Take the link of a host down."""
        _ip("-n", self._switch, "link", "set", f"p{host}", "down")

    def heal(self, host: str) -> None:
        """Take the link of a host up again."""
        _ip("-n", self._switch, "link", "set", f"p{host}", "up")

    def slow_down(self, host: str, rate: str) -> None:
        """Let a host send at `rate` (as in `8mbit`) only."""
        words = ["root", "tbf", "rate", rate, "burst", "64kbit", "latency", "400ms"]
        tc = ["tc", "-n", self._space(host), "qdisc", "add", "dev", "eth0", *words]
        subprocess.run(tc, check=True, capture_output=True)

    def kill(self, host: str) -> None:
        """End every process of a host at once, with its link: as if its power had gone."""
        self.cut(host)
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self, host: str) -> list[int]:
        """Return the processes that run on a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._space(host)], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]

    def _space(self, host: str) -> str:
        return f"{self._prefix}{host}"

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        lines = "".join(f"{self.address(host)} {host}\n" for host in self.names)
        for host in self.names:
            space, own = self._space(host), f"v{os.getpid() % 10**6}{host}"
            _ip("netns", "add", space)
            _ip("link", "add", own, "type", "veth", "peer", "name", f"p{host}", "netns", self._switch)
            _ip("link", "set", own, "netns", space)
            _ip("-n", space, "link", "set", own, "name", "eth0")
            _ip("-n", self._switch, "link", "set", f"p{host}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            etc = Path("/etc/netns") / space  # `ip netns exec` shows it as /etc
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")

    def _remove(self) -> None:
        for host in self.names:
            for pid in self.pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        for space in (*map(self._space, self.names), self._switch):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    def wait_until_empty(self, seconds: float) -> float:
        """Return after how many seconds no process runs on any host; raises TimeoutError if some still do."""
        began = time.monotonic()
        while left := {host: pids for host in self.names if (pids := self.pids(host))}:
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"still running: {left}")
            time.sleep(0.1)
        return time.monotonic() - began


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
