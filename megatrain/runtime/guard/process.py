"""The guard of one process: it reads the process's record, reports to the hub, and ends the process when it must.

It runs beside the process that it guards, from its start to its end, with the standard library alone.
"""

import contextlib
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.runtime.alive import Effort
from megatrain.runtime.guard.hub import Hub, Message, clock
from megatrain.runtime.guard.link import Link
from megatrain.runtime.guard.record import SIZE, Snapshot, read
from megatrain.runtime.guard.report import write_report, write_status
from megatrain.runtime.processes import VERDICT

STACK_S = 1.0
"""How long the guard waits for the stacks of its process."""
GRACE_S = 5.0
"""How long a process may take to hear the verdict, and then to raise it; after that it is killed."""
LEAVING_S = 30.0
"""How long one that has raised its error may take to end: its report is written then."""
RECENT = 64
"""Calls of the ring that a rank tells of."""
MOST_S = 2.0
"""Longest time between two beats."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that all processes of a job get from a terminal or a scheduler: this one ends with its process."""


def main(**facts: Any) -> None:
    """Guard the process that has started this one."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Watch(**facts).run()


class Watch:
    """The guard's state. `pid` is the process that it guards."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        local_rank: int,
        limit: float,
        pid: int,
        meeting: str | None,
        record: int,
        stacks: int,
    ) -> None:
        self.rank, self.size, self.local_rank, self.limit, self.pid = rank, size, local_rank, limit, pid
        self.meeting, self.stacks, self.host = meeting, stacks, socket.gethostname()
        self.memory = mmap.mmap(record, SIZE, prot=mmap.PROT_READ)
        self.process = Link(0, out=1)
        self.to_hub: Link | None = None
        self.where: Message = {}
        self.hub: Hub | None = None
        self.heard = 0.0
        """When the hub last answered; 0: never."""
        self.channels: dict[int, Message] = {}
        self.run_facts: Message = {}
        self.selector = selectors.DefaultSelector()
        self.verdict, self.verdict_at, self.killed = "", 0.0, False
        self.recorded = False
        self.is_leaving = self.is_over = self.said_bye = False
        self.asks = 0.0
        self.next_beat = 0.0
        self.effort = Effort(pid)
        self.floor = self.ticked = time.monotonic()
        """What was before this moment is not counted as standing still: this process was stopped as well."""

    @property
    def every_s(self) -> float:
        """Seconds between two beats."""
        return min(max(self.limit / 8, 0.25), MOST_S)

    def run(self) -> None:
        """Wait until the guarded process is gone, and report meanwhile."""
        self.selector.register(0, selectors.EVENT_READ, self._from_process)
        with contextlib.suppress(AttributeError, OSError):
            self.selector.register(os.pidfd_open(self.pid), selectors.EVENT_READ, self._gone)
        while not self.is_over:
            for key, _ in self.selector.select(max(min(self.next_beat - time.monotonic(), 0.5), 0.01)):
                if self.selector.get_map().get(key.fd) is key:  # else closed by what another one has told
                    key.data()
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.ticked > 1.0 + self.limit / 4:
            self.floor = now
            self.heard = now if self.heard else 0.0
        self.ticked = now
        if os.getppid() != self.pid:
            self._gone()
        if self.to_hub is not None:
            self.to_hub.flush()
        if now >= self.next_beat:
            self.next_beat = now + self.every_s
            self._connect()
            if not self.said_bye:
                self._tell({"do": "beat", **self._now(read(self.memory))})
        if self.hub is not None:
            for notice in self.hub.tick():
                self.process.send(notice)
            self._publish()
        self._look_at_hub(now)
        if self.verdict and not self.is_over:
            self._insist(now)

    # The process that is guarded.

    def _from_process(self) -> None:
        for message in self.process.receive():
            what = message.pop("do")
            if what == "channel":
                self.channels[message.pop("index")] = message
            elif what == "run":
                self.run_facts |= message
                if "limit" in message:  # the past was under another one
                    self.limit, self.floor, self.next_beat = message["limit"], time.monotonic(), 0.0
                if self.hub is not None:
                    self.hub.limit_to(self.limit)
            elif what == "alone":
                self._open_hub()
            elif what == "listen":
                self._listen(message["address"])
            elif what == "report to":
                self.where = message
                self._connect()
            elif what == "failed":
                self.is_leaving = True
                self.asks = time.monotonic()
                self._tell({"do": "failed", **message, **self._dump(with_stack=not message["is_own"])})
                if self.verdict:
                    self.process.send({"verdict": self.verdict})
            elif what == "bye":
                self.said_bye = True
                self._tell({"do": "bye"})
        if not self.process.is_open:
            self.selector.unregister(0)
            if self.said_bye:
                self._end()

    def _gone(self) -> None:
        """Tell that the guarded process has ended, and end, too."""
        if not self.is_over:
            if not self.said_bye and not self.verdict:
                self._tell({"do": "gone", **self._dump(with_stack=False)})
            self._end()

    def _end(self) -> None:
        """End, but stay for as long as others may need the hub."""
        self.is_over = True
        deadline = time.monotonic() + GRACE_S + (0.0 if self.said_bye else self.every_s)
        if self.hub is None:
            while self.to_hub is not None and self.to_hub.is_full and time.monotonic() < deadline:
                time.sleep(0.01)
                self.to_hub.flush()
            return
        others = set(range(self.size)) - {self.rank}
        while time.monotonic() < deadline and (self.linked or not others <= set(self.hub.members)):
            for key, _ in self.selector.select(0.1):
                is_open = self.selector.get_map().get(key.fd) is key
                if is_open and key.data not in (self._gone, self._from_process):
                    key.data()
            self.hub.tick()
            self._publish()
        if self.rank == 0 and self.verdict and not self.is_leaving:
            self._record()

    # The hub: in this process, or in the guard of rank 0.

    def _open_hub(self) -> str:
        """Open the hub, for this process at first; return the token of others."""
        token = os.urandom(16).hex()
        self.hub = Hub(self.size, token, self.limit)
        self.linked: dict[int, Link] = {}
        self.hub.join({"rank": self.rank, "host": self.host}, self._from_hub)
        return token

    def _listen(self, address: str) -> None:
        """Open the hub at `address`, or at all addresses if that is not this host's."""
        token = self._open_hub()
        for place in (address, ""):
            with contextlib.suppress(OSError):
                family = (
                    socket.getaddrinfo(place or None, 0, type=socket.SOCK_STREAM)[0][0]
                    if place
                    else socket.AF_INET
                )
                server = socket.create_server((place, 0), family=family, backlog=self.size)
                server.setblocking(False)
                self.selector.register(server, selectors.EVENT_READ, partial(self._admit, server))
                port = server.getsockname()[1]
                self.process.send({"port": port, "token": token, "host": self.host, "pid": self.pid})
                return
        self.process.send({"port": 0})

    def _admit(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            link = Link(connection.detach())
            self.selector.register(link.file, selectors.EVENT_READ, lambda: self._from_guard(link))

    def _from_guard(self, link: Link) -> None:
        assert self.hub is not None
        for message in link.receive():
            if link.rank is not None:
                self.hub.take(link.rank, message)
            elif self.hub.admits(message):
                link.rank = self.hub.join(message, link.send)
                self.linked[link.rank] = link
            else:
                link.is_open = False
        if not link.is_open:
            with contextlib.suppress(KeyError):  # an end that the message has brought about
                self.selector.unregister(link.file)
            os.close(link.file)
            if link.rank is not None and self.linked.pop(link.rank, None) is not None:
                self.hub.cut(link.rank)
        self._publish()

    def _connect(self) -> None:
        """Connect to the hub, if this process should and does not yet."""
        if not self.where or self.to_hub is not None or self.hub is not None or self.heard:
            return
        with contextlib.suppress(OSError):
            connection = socket.create_connection((self.where["address"], self.where["port"]), timeout=2.0)
            self.to_hub = Link(connection.detach())
            self.heard = time.monotonic()
            hello = {"rank": self.rank, "host": self.host, "token": self.where["token"]}
            self.to_hub.send(hello)
            self.selector.register(self.to_hub.file, selectors.EVENT_READ, self._read_hub)

    def _read_hub(self) -> None:
        assert self.to_hub is not None
        for message in self.to_hub.receive():
            self._from_hub(message)
        if not self.to_hub.is_open:
            self.selector.unregister(self.to_hub.file)

    def _tell(self, message: Message) -> None:
        if self.hub is not None:
            self.hub.take(self.rank, message)
            self._publish()
        elif self.to_hub is not None:
            self.to_hub.send(message)

    def _from_hub(self, message: Message) -> None:
        self.heard = time.monotonic()
        if message["do"] == "dump" and not self.said_bye and not self.is_leaving:
            self._tell({"do": "dump", **self._dump(with_stack=True)})
        elif message["do"] == "verdict":
            self._pass(message["text"])

    def _look_at_hub(self, now: float) -> None:
        """Pass a verdict of its own if the hub does not answer."""
        if self.hub is not None or not self.heard or self.verdict or self.said_bye:
            return
        closed = self.to_hub is not None and not self.to_hub.is_open
        silent = now - self.heard
        if silent > max(self.limit, 2 * MOST_S) or (closed and self.asks and now - self.asks > 1.0):
            what = "ended, or its machine is down" if closed else "its machine or the network to it is down"
            who = f"Rank 0 (host {self.where['host']})"
            self._pass(f"{who} has given no sign since {clock(silent)} ({silent:.0f} s): {what}.")
            if self.local_rank == 0:  # in the place of rank 0, which writes the record otherwise
                write_status(self.run_facts.get("directory"), self.where["pid"], self.verdict)

    # What is said of the process, and done to it.

    def _now(self, found: Snapshot) -> Message:
        now = time.monotonic()
        if now - max(found.progress, self.floor) > self.limit / 3 and not found.waits_from:
            self._excuse(found, now)
        on_device = found.phase == "result"  # NCCL's collectives are waited for there
        waits_from = found.waits_from or (found.progress if on_device else 0.0)
        return {
            "age": now - max(found.progress, self.floor),
            "waits": now - waits_from if waits_from else None,
            "phase": found.phase,
            "step": found.step,
            "own": found.own_s,
            "timed": found.timed_steps,
            "stage": self.run_facts.get("stage", 0),
            "state": self._state(),
        }

    def _excuse(self, found: Snapshot, now: float) -> None:
        """Let work count as progress, as a compiler's, but for waiting for a device; alone it may also be stopped."""
        is_stopped = self.size == 1 and self._state() in ("T", "t")
        if is_stopped or (found.phase != "result" and self.effort.goes_on(within_s=3 * self.every_s)):
            self.floor = now

    def _dump(self, *, with_stack: bool) -> Message:
        found, now = read(self.memory, entries=RECENT), time.monotonic()

        def rows(entries: list[Any]) -> list[list[Any]]:
            known = [
                (self.channels[entry.channel], entry) for entry in entries if entry.channel in self.channels
            ]
            return [
                [
                    self._name(channel),
                    channel["ranks"],
                    entry.number,
                    now - entry.began,
                    entry.operation,
                    entry.shape,
                    entry.dtype,
                    entry.site,
                ]
                for channel, entry in known
            ]

        message = {**self._now(found), "last": rows(found.last), "recent": rows(found.recent)}
        if with_stack:
            message["stack"] = self._stack()
        return message

    def _name(self, channel: Message) -> str:
        group, _, pair = channel["name"].partition(" ")
        if channel["name"].startswith("meetings"):
            return str(channel["name"])
        named = self.run_facts.get("axes", {}).get(group, f"group {group}")
        return f"{named} {pair}" if channel["pair"] else named

    def _state(self) -> str:
        """Return the letter of the process's state; empty where /proc is missing."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return ""

    def _stack(self) -> str:
        """Let the process write its stacks, and return them; empty if it can't."""
        before = os.fstat(self.stacks).st_size
        if self._state() in ("T", "t", "D"):
            return ""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGURG)
        deadline, size = time.monotonic() + STACK_S, before
        while time.monotonic() < deadline:
            time.sleep(0.02)
            now = os.fstat(self.stacks).st_size
            if now == size > before:
                break
            size = now
        return os.pread(self.stacks, 1 << 16, before).decode(errors="replace")

    def _publish(self) -> None:
        """Write the report as soon as the hub has its verdict."""
        if self.hub is not None and self.hub.verdict is not None and not self.hub.reported:
            self.hub.reported = True
            write_report(self.run_facts.get("directory"), self.hub.verdict, self.hub.statements)

    def _pass(self, text: str) -> None:
        """Let the process raise the verdict."""
        if self.verdict:
            return
        self.verdict, self.verdict_at = text, time.monotonic()
        if self.meeting:  # for the launcher of this machine: what it kills has not failed by itself
            with contextlib.suppress(OSError):
                Path(f"{self.meeting}{VERDICT}").write_text(text)
        self.process.send({"verdict": text})
        if not self.is_leaving:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGVTALRM)
        if self.local_rank == 0 and self.rank:
            self._say(text)

    def _insist(self, now: float) -> None:
        """End the process with SIGKILL if it does not end by itself after the verdict."""
        limit = LEAVING_S if self.is_leaving else GRACE_S
        if now - self.verdict_at > limit and not self.killed:
            self.killed = True
            if self.rank == 0:
                self._record()
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    def _record(self) -> None:
        """Say and record the verdict in the place of the process, which could not."""
        if not self.recorded:
            self.recorded = True
            write_status(self.run_facts.get("directory"), self.pid, self.verdict)
            self._say(self.verdict)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"megatrain: {text}\n".encode())
