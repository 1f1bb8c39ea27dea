"""Where the guards of all ranks report to, in the guard of rank 0: it notices who is silent, stuck or slow."""

import hmac
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from megatrain.runtime.guard.verdict import Call, Statement, Verdict, judge

DUMP_S = 3.0
"""How long the hub waits for what the ranks have to say."""
SILENT_S = 4.0
"""How long a guard is not called silent, whatever the limit: until it knows that, it writes every other second."""
OWN_S = 2.0
"""How long it waits after an error of a rank for the others, which may have the same and end by themselves."""
SLOW = 1.5
"""Times the median of the others' own seconds a step from which a rank is called slow."""
SLOW_S = 0.005
"""Seconds a step that a slow rank is slower than that, at least."""
SLOW_STEPS = 16
"""Steps that were timed before a rank is called slow: twice the window of its median."""
Message = dict[str, Any]


@dataclass(slots=True)
class Member:
    """One rank, as the hub knows it."""

    rank: int
    host: str
    send: Callable[[Message], None]
    heard: float
    """When its guard last wrote; seconds, monotonic."""
    beat: Message = field(default_factory=dict)
    failed: Message | None = None
    is_over: bool = False
    """It ended properly, as it said."""
    gone: float | None = None
    """Since when its process, or its guard, is gone."""
    fate_at: float = 0.0
    dump: Message = field(default_factory=dict)
    dumped_at: float = 0.0


class Hub:
    """The members, and the verdict once there is one."""

    def __init__(self, size: int, token: str, limit: float) -> None:
        self.size, self.token, self.limit = size, token, limit
        self.members: dict[int, Member] = {}
        self.verdict: Verdict | None = None
        self.statements: list[Statement] = []
        self.reported = False
        self._asked: float | None = None
        self._ends: float = 0.0
        self._slow: set[int] = set()
        self._limit_since = time.monotonic()
        self._ticked = time.monotonic()

    def limit_to(self, limit: float) -> None:
        """Let nothing stand still for longer than `limit` from now on."""
        if limit != self.limit:
            self.limit, self._limit_since = limit, time.monotonic()

    def admits(self, hello: Message) -> bool:
        """Return whether a guard that says `hello` belongs to this run."""
        return hmac.compare_digest(str(hello.get("token")), self.token) and isinstance(hello.get("rank"), int)

    def join(self, hello: Message, send: Callable[[Message], None]) -> int:
        """Take in a guard; return its rank."""
        rank = int(hello["rank"])
        self.members[rank] = member = Member(rank, str(hello["host"]), send, time.monotonic())
        if self._asked is not None:
            member.send({"do": "dump"})
        return rank

    def take(self, rank: int, message: Message) -> None:
        """Take in what the guard of `rank` says."""
        member, now = self.members[rank], time.monotonic()
        member.heard = now
        what = message["do"]
        if what == "beat":
            member.beat = message
            member.send({"do": "heard"})
        elif what == "dump":
            member.dump, member.dumped_at = message, now
        elif what == "bye":
            member.is_over = True
        elif what in ("failed", "gone"):
            member.dump, member.dumped_at = message | member.dump if member.failed else message, now
            if what == "failed":
                member.failed = member.failed or message
            elif not member.is_over and member.failed is None:
                member.gone = now
            member.fate_at = member.fate_at or now
            if member.gone or not message.get("is_own"):
                self._ask(DUMP_S)
            else:
                self._ask(OWN_S)
        if self.verdict is not None:
            self._announce(member)

    def cut(self, rank: int) -> None:
        """Note that the connection to the guard of `rank` is closed."""
        member = self.members[rank]
        if not member.is_over and member.failed is None and member.gone is None:
            member.gone = member.fate_at = time.monotonic()

    def tick(self) -> list[Message]:
        """Look after time: who is silent or stuck, and whether all have answered. Return notices."""
        now = time.monotonic()
        if (
            now - self._ticked > 1.0 + self.limit / 4
        ):  # this process was stopped: it knows nothing of that time
            for member in self.members.values():
                member.heard = max(member.heard, now)
        self._ticked = now
        if self.verdict is not None:
            return []
        alive = [each for each in self.members.values() if not (each.is_over or each.gone or each.failed)]
        are_all = len(self.members) == self.size  # before that, joining has its own limit
        is_known = now - self._limit_since > self.limit
        if self._asked is None:
            stuck = are_all and is_known and any(each.beat.get("age", 0.0) > self.limit for each in alive)
            silent = any(self._is_silent(each, now) for each in alive)
            ended = any(each.gone and now - each.gone > self.limit for each in self.members.values())
            if stuck or silent or ended:
                self._ask(DUMP_S)
        else:
            told = all(each.dumped_at >= self._asked or self._is_silent(each, now) for each in alive)
            if now >= self._ends or (told and are_all):
                self._conclude(now)
        return self._slow_ranks(alive)

    def _ask(self, seconds: float) -> None:
        if self._asked is None and self.verdict is None:
            self._asked = time.monotonic()
            self._ends = self._asked + seconds
            for member in self.members.values():
                member.send({"do": "dump"})

    def _is_silent(self, member: Member, now: float) -> bool:
        return now - member.heard > max(self.limit, SILENT_S)

    def _conclude(self, now: float) -> None:
        members = [each for each in self.members.values() if not each.is_over]
        own = [each for each in members if each.failed and each.failed["is_own"]]
        if own and len(own) == len(members):
            self._asked = None  # all say it themselves
            return
        if own and now < self._ends:
            return
        self.statements = [self._statement(each, now) for each in members]
        self.verdict = judge(self.statements, clock)
        for member in self.members.values():
            self._announce(member)

    def _announce(self, member: Member) -> None:
        assert self.verdict is not None
        member.send({"do": "verdict", "text": self.verdict.sentence, "ranks": self.verdict.ranks})

    def _statement(self, member: Member, now: float) -> Statement:
        fate, since = "", 0.0
        if member.failed and member.failed["is_own"]:
            fate, since = "failed", member.fate_at
        elif member.gone:
            fate, since = "gone", member.gone
        elif self._is_silent(member, now):
            fate, since = "lost", member.heard
        dump = member.dump or member.beat
        late = now - (member.dumped_at or member.heard)  # what was an age then is more now
        return Statement(
            rank=member.rank,
            host=member.host,
            fate=fate,
            fate_age_s=now - since if fate else 0.0,
            text=(member.failed or {}).get("text", ""),
            state=dump.get("state", ""),
            phase=dump.get("phase", ""),
            step=dump.get("step", -1),
            age_s=dump.get("age", 0.0) + late,
            waits_s=None if dump.get("waits") is None else dump["waits"] + late,
            last=_calls(dump.get("last", []), late),
            recent=_calls(dump.get("recent", []), late),
            stack=dump.get("stack", ""),
        )

    def _slow_ranks(self, alive: list[Member]) -> list[Message]:
        """Return a notice for each rank that is found slow for the first time, among those of its pipeline stage."""
        stages: dict[Any, list[Member]] = defaultdict(list)
        for member in alive:
            if member.beat.get("timed", 0) >= SLOW_STEPS:
                stages[member.beat.get("stage")].append(member)
        notices = []
        for members in stages.values():
            for each in members:
                others = [other.beat["own"] for other in members if other is not each]
                usual, own = statistics.median_low(others) if others else 0.0, each.beat["own"]
                if not others or each.rank in self._slow or own < max(SLOW * usual, usual + SLOW_S):
                    continue
                self._slow.add(each.rank)
                text = (
                    f"Rank {each.rank} (host {each.host}) is slow: {own:.3g} s of its own work a step, without "
                    f"waiting, where the others take {usual:.3g} s. All wait for it."
                )
                notices.append(
                    {"notice": text, "rank": each.rank, "host": each.host, "own_s": own, "usual_s": usual}
                )
        return notices


def clock(age_s: float) -> str:
    """Return the time of day, UTC, of what was so many seconds ago."""
    return datetime.fromtimestamp(time.time() - age_s, UTC).strftime("%H:%M:%S UTC")


def _calls(rows: list[list[Any]], late: float) -> tuple[Call, ...]:
    return tuple(
        Call(name, tuple(ranks), number, age + late, *rest) for name, ranks, number, age, *rest in rows
    )
