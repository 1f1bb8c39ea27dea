"""Which rank keeps the others waiting, found by comparing what all of them have last done.

Who waits in a collective waits for those ranks of its group that have not begun it: their number in that channel is
lower. One that is waited for and waits for nobody is the cause. Ranks that have begun different collectives under the
same number are named as such.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

SHOWN = 8
"""Ranks that a sentence names at most."""
SAME_SHAPE = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")
"""Collectives whose input has the same shape on all ranks."""
STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "in an uninterruptible wait (disk or network)",
}
"""Letter of a process's state in /proc -> what it means; others are usual."""
STOPPED = ("T", "t")
LIBRARIES = ("/lib/python", "<frozen", "/megatrain/runtime/")
"""Parts of names of files that do not say what a rank was about."""
Clock = Callable[[float], str]
"""Time of day of what was so many seconds ago."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective that a rank has begun."""

    channel: str
    """Name of its channel: the axis of its group, or two ranks."""
    ranks: tuple[int, ...]
    """Ranks that take part."""
    number: int
    age_s: float
    operation: str
    shape: str
    dtype: str
    site: str

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """The channel, the same on all its ranks."""
        return self.channel, self.ranks

    def __str__(self) -> str:
        tensor = f" of {self.dtype} {self.shape}" if self.dtype else ""
        return (
            f"{self.operation}{tensor}, number {self.number} of {self.channel} (ranks {_ranges(self.ranks)})"
        )


@dataclass(frozen=True, slots=True)
class Statement:
    """What is known of one rank."""

    rank: int
    host: str
    fate: str = ""
    """failed, gone (ended without a word), lost (nothing of its host answers), or empty."""
    fate_age_s: float = 0.0
    text: str = ""
    """Its error, if it failed."""
    state: str = ""
    """Letter of its process's state in /proc."""
    phase: str = ""
    step: int = -1
    age_s: float = 0.0
    """Seconds since its last sign of progress."""
    waits_s: float | None = None
    """Seconds for which it has waited for others; None: it does not."""
    last: tuple[Call, ...] = ()
    """The last call of each channel."""
    recent: tuple[Call, ...] = ()
    stack: str = ""
    """Stacks of its threads, as faulthandler writes them."""


@dataclass(slots=True)
class Verdict:
    """The answer: a sentence, and the ranks that it is about."""

    sentence: str
    ranks: list[int] = field(default_factory=list)
    age_s: float = 0.0
    """How long ago it began."""


def judge(found: list[Statement], when: Clock) -> Verdict:
    """Return what is wrong with the ranks of a run that stands still."""
    if odd := _differing_calls(found):  # gloo ends a process that gets other sizes than it expects
        return odd
    for fate in ("failed", "gone", "lost"):
        if those := [each for each in found if each.fate == fate]:
            return _of_fate(fate, those, when)
    missing = _missing(found)
    stopped = [each for each in found if each.state in STATES]
    causes = [each for each in found if each.rank in missing] or stopped
    if not causes:
        return _nobody_missing(found, when)
    first = causes[0]
    call, waiting = missing.get(first.rank, (None, None))
    same = [each for each in causes if missing.get(each.rank, (None, None))[0] == call] if call else causes
    who = _who(same)
    if call is None or waiting is None:
        age = max(each.age_s for each in same)
        inside = (
            min(first.last, key=lambda call: call.age_s, default=None) if first.waits_s is not None else None
        )
        what = f" in {inside} ({inside.site})" if inside else ""
        sentence = f"{who} has stood still{what} since {when(age)}: {_state(first)}."
        return Verdict(sentence, [each.rank for each in same], age)
    sentence = (
        f"{who} did not arrive at {call}, where rank {waiting.rank} has waited since {when(call.age_s)} "
        f"({call.site}): {_state(first)}."
    )
    return Verdict(sentence, [each.rank for each in same], call.age_s)


def _of_fate(fate: str, those: list[Statement], when: Clock) -> Verdict:
    first = max(those, key=lambda each: each.fate_age_s)
    if fate == "failed":
        sentence = f"{_who([first])} failed at {when(first.fate_age_s)} {_doing(first)}: {first.text}"
        return Verdict(sentence, [first.rank], first.fate_age_s)
    if fate == "gone":
        how = "it was killed (by a person, the scheduler, or the system for want of memory) or crashed"
        sentence = f"{_who([first])} ended without a word at {when(first.fate_age_s)} {_doing(first)}: {how}."
        return Verdict(sentence, [first.rank], first.fate_age_s)
    sentence = (
        f"{_who(those)} has given no sign since {when(first.fate_age_s)} ({first.fate_age_s:.0f} s): its machine or "
        "the network to it is down."
    )
    return Verdict(sentence, [each.rank for each in those], first.fate_age_s)


def _differing_calls(found: list[Statement]) -> Verdict | None:
    """Return a verdict if ranks have begun different collectives under the same number of a channel."""
    calls: dict[tuple[object, int], dict[int, Call]] = defaultdict(dict)
    for each in found:
        for call in (*each.recent, *each.last):
            calls[call.key, call.number][each.rank] = call
    worst: Verdict | None = None
    for by_rank in calls.values():
        kinds = Counter(_kind(call) for call in by_rank.values())
        if len(kinds) < 2 or all(call.operation in ("send", "receive") for call in by_rank.values()):
            continue
        (usual, _), *_ = kinds.most_common()
        odd = [rank for rank, call in by_rank.items() if _kind(call) != usual]
        other = next(rank for rank, call in by_rank.items() if _kind(call) == usual)
        theirs, ours = by_rank[odd[0]], by_rank[other]
        age = max(call.age_s for call in by_rank.values())
        if worst is None or age > worst.age_s:
            those = [each for each in found if each.rank in odd]
            sentence = (
                f"{_who(those)} called {theirs} at {theirs.site}, where rank {other} called {ours.operation}"
                f"{f' of {ours.dtype} {ours.shape}' if ours.dtype else ''} at {ours.site}."
            )
            worst = Verdict(sentence, odd, age)
    return worst


def _kind(call: Call) -> tuple[str, ...]:
    """Return what must be equal on all ranks of a collective."""
    if call.operation in SAME_SHAPE:
        return call.operation, call.shape, call.dtype
    return (call.operation,)


def _missing(found: list[Statement]) -> dict[int, tuple[Call, Statement]]:
    """Return the ranks that others wait for and that wait for nobody, each with the call that lacks it longest."""
    known = {each.rank: each for each in found}
    numbers = {each.rank: {call.key: call.number for call in each.last} for each in found}
    waited_for: dict[int, list[tuple[Call, Statement]]] = defaultdict(list)
    waits: dict[int, set[int]] = defaultdict(set)
    for each in found:
        if each.waits_s is None or each.state in STOPPED:
            continue
        for call in each.last:
            for rank in call.ranks:
                if rank in known and numbers[rank].get(call.key, 0) < call.number:
                    waited_for[rank].append((call, each))
                    waits[each.rank].add(rank)
    ends = [rank for rank in waited_for if not waits[rank]] or list(waited_for)  # a circle: all of them
    longest = {rank: max(waited_for[rank], key=lambda pair: pair[0].age_s) for rank in ends}
    return dict(sorted(longest.items(), key=lambda item: -item[1][0].age_s))


def _nobody_missing(found: list[Statement], when: Clock) -> Verdict:
    """Return a verdict on ranks of which none waits for another one in particular."""
    busy = [each for each in found if each.waits_s is None]
    if not busy:
        oldest = max(found, key=lambda each: each.age_s)
        call = min((call for each in found for call in each.last), key=lambda call: call.age_s, default=None)
        what = "the last collective" if call is None else f"{call} ({call.site})"
        since = when(oldest.age_s)
        sentence = (
            f"All ranks arrived at {what}, but it has not ended since {since}: a network or device fault."
        )
        return Verdict(sentence, [], oldest.age_s)
    oldest = max(busy, key=lambda each: each.age_s)
    sentence = f"{_who([oldest])} has stood still since {when(oldest.age_s)}: {_state(oldest)}."
    return Verdict(sentence, [oldest.rank], oldest.age_s)


def _who(those: list[Statement]) -> str:
    """Return the ranks in words, with their hosts."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for each in those[:SHOWN]:
        hosts[each.host].append(each.rank)
    parts = [
        f"{'s' * (len(ranks) > 1)} {_ranges(tuple(ranks))} (host {host})" for host, ranks in hosts.items()
    ]
    more = f" and {len(those) - SHOWN} more" if len(those) > SHOWN else ""
    return f"Rank{parts[0]}" + "".join(f", rank{part}" for part in parts[1:]) + more


def _doing(each: Statement) -> str:
    step = f" of step {each.step}" if each.step >= 0 else ""
    return f"in the phase '{each.phase}'{step}" if each.phase else "at its start"


def _state(each: Statement) -> str:
    """Say how a rank is, and where it stands."""
    how = f"it is {STATES[each.state]}, " if each.state in STATES else "it is "
    if each.waits_s is not None and each.last and each.state not in STOPPED:
        call = min(each.last, key=lambda call: call.age_s)
        return f"{how}{_doing(each)}, and waits in {call} ({call.site})"
    where = place(each.stack)
    return f"{how}{_doing(each)}{f', at {where}' if where else ''}"


def place(stack: str) -> str:
    """Return the file, line and function where the main thread stands: the first that is no library's."""
    lines = stack.splitlines()
    begins = [n for n, line in enumerate(lines) if line.startswith(("Current thread", "Thread "))]
    current = next((n for n in begins if lines[n].startswith("Current")), begins[-1] if begins else None)
    if current is None:
        return ""
    frames = []
    for line in lines[current + 1 :]:
        if not line.startswith("  File "):
            break
        path, _, rest = line[len('  File "') :].partition('", line ')
        number, _, function = rest.partition(" in ")
        frames.append((path, number, function))
    own = [frame for frame in frames if not any(part in frame[0] for part in LIBRARIES)]
    if not (own or frames):
        return ""
    path, number, function = (own or frames)[0]
    at = path.rfind("/megatrain/")
    shown = path[at + 1 :] if at >= 0 else "/".join(path.split("/")[-2:])
    return f"{shown}:{number} in {function}"


def _ranges(ranks: tuple[int, ...]) -> str:
    """Return ranks in short: 0-3, 8."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    texts = ["-".join(map(str, part)) for part in parts]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
