"""Check of all machines of a run before its first step: are they alike and healthy, and are they connected as fast?

What must be equal is compared with what most machines have; who differs is named.
"""

import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from megatrain.config.errors import UserError
from megatrain.resilience.config import ResilienceConfig
from megatrain.resilience.machine_facts import MachineFacts, machine_facts
from megatrain.runtime.processes import Processes

SKEW_S = 5.0
"""Difference between clocks from which it is told of."""
LEAST_FREE_GIB = 1.0
LEAST_MEMORY_GIB = 0.5
SHOWN = 6
"""Machines, or names, that a message lists at most."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with some machines."""

    text: str
    is_fatal: bool
    """Whether the run would compute something else, or hardly at all."""
    hosts: tuple[str, ...] = ()
    """Names of the machines without which it would not be there."""


def look_around(processes: Processes, device: torch.device) -> list[MachineFacts]:
    """Return what every process finds, by rank; all of them call this together."""
    own = processes.agree(lambda: machine_facts(processes.rank, device))
    processes.gather(None)  # then all are here: their clocks are read at the same moment
    return processes.gather(replace(own, time=time.time()))


def check_machines(found: list[MachineFacts]) -> list[Problem]:
    """Return the problems of the machines of which `found` tells."""
    return [
        *_unlike(found, "the code of megatrain", lambda facts: {"its hash": facts.code}, is_fatal=True),
        *_unlike(found, "the version of", lambda facts: facts.versions, is_fatal=True),
        *_unlike(found, "the environment variable", lambda facts: facts.settings, is_fatal=True),
        *_unlike(found, "the environment variable", lambda facts: facts.routes, is_fatal=False),
        *_unlike(found, "the device", lambda facts: {"its name": facts.device}, is_fatal=False),
        *_unhealthy(found),
        *_short_of_space(found),
        *_skewed(found),
    ]


def heed(problems: Iterable[Problem], cfg: ResilienceConfig) -> list[str]:
    """Return what is to be told of `problems`.

    Raises:
        UserError: one is fatal, and the config refuses that.
    """
    every = list(problems)
    fatal = [problem.text for problem in every if problem.is_fatal]
    if fatal and cfg.preflight == "refuse":
        raise UserError(
            "\n".join(
                [
                    *fatal,
                    "Make the machines alike, or leave out the one named (resilience.preflight=warn to go on).",
                ]
            )
        )
    return [problem.text for problem in every]


def require_same_data(processes: Processes, fingerprint: str) -> None:
    """Check that all processes have read the same data.

    Raises:
        UserError: some have not.
    """
    hosts = [
        MachineFacts(rank, host, each, {}, {}, {}, "")
        for rank, (host, each) in enumerate(processes.gather((socket.gethostname(), fingerprint[:12])))
    ]
    for problem in _unlike(
        hosts, "the content of data.path", lambda facts: {"its fingerprint": facts.code}, is_fatal=True
    ):
        raise UserError(f"The processes read different data. {problem.text}")


def _unlike(
    found: list[MachineFacts], what: str, part: Callable[[MachineFacts], dict[str, str]], *, is_fatal: bool
) -> list[Problem]:
    """Return a problem for each name under which some machines have another value than most."""
    names = dict.fromkeys(name for facts in found for name in part(facts))
    problems = []
    for name in names:
        values = [part(facts).get(name, "none") for facts in found]
        ((usual, _), *others) = Counter(values).most_common()
        if not others:
            continue
        odd: dict[str, list[MachineFacts]] = defaultdict(list)
        for facts, value in zip(found, values, strict=True):
            if value != usual:
                odd[value].append(facts)
        like = next(facts for facts, value in zip(found, values, strict=True) if value == usual)
        told = "; ".join(f"{value} on {_hosts(those)}" for value, those in odd.items())
        subject = f"{what} {name}" if not name.startswith("its ") else f"{what} ({name.removeprefix('its ')})"
        text = f"Machines differ in {subject}: {told}, where {_hosts([like])} has {usual}."
        hosts = dict.fromkeys(facts.host for those in odd.values() for facts in those)
        problems.append(Problem(text, is_fatal, tuple(hosts)))
    return problems


def _unhealthy(found: list[MachineFacts]) -> list[Problem]:
    return [
        Problem(
            f"The {facts.device} of rank {facts.rank} on {facts.host}: {', '.join(facts.unhealthy)}.",
            True,
            (facts.host,),
        )
        for facts in found
        if facts.unhealthy
    ]


def _short_of_space(found: list[MachineFacts]) -> list[Problem]:
    problems = []
    first = {facts.host: facts for facts in reversed(found)}
    for facts in first.values():
        for place, free in facts.free_gib.items():
            if free < (LEAST_MEMORY_GIB if place == "memory" else LEAST_FREE_GIB):
                amount = (
                    f"{free:.2f} GiB of memory are available"
                    if place == "memory"
                    else f"{free:.2f} GiB are free for {place}"
                )
                problems.append(Problem(f"Only {amount} on {facts.host}.", False))
    return problems


def _skewed(found: list[MachineFacts]) -> list[Problem]:
    """Return a problem for each machine whose clock is not that of most, or not the first one's where there are two."""
    first = list({facts.host: facts for facts in reversed(found)}.values())
    like = min(found, key=lambda facts: facts.rank)
    if len(first) > 2:
        like = sorted(first, key=lambda facts: facts.time)[len(first) // 2]
    problems = []
    for facts in first:
        late = facts.time - like.time
        if abs(late) > SKEW_S:
            text = (
                f"The clock of {facts.host} is {abs(late):.0f} s {'ahead of' if late > 0 else 'behind'} that of "
                f"{like.host}: times in logs do not fit together, and torchrun's c10d rendezvous can split the job. "
                "Synchronize it (NTP)."
            )
            problems.append(Problem(text, False))
    return problems


def _hosts(those: list[MachineFacts]) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for facts in those:
        hosts[facts.host].append(facts.rank)
    texts = [
        f"{host} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:SHOWN]))})"
        for host, ranks in hosts.items()
    ]
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")
