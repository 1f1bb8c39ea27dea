"""Bandwidth between the machines of a run, and of the groups of its parallel axes, against the median of their kind."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from megatrain.resilience.preflight import Problem
from megatrain.runtime.processes import Processes

BYTES = {"cpu": 2**20, "cuda": 2**26}
"""Size of a message on each kind of device: 1 MiB and 64 MiB."""
REPEATS = 3
QUICK_S = 3.0
"""What takes longer the first time, for anybody, is not repeated."""
SHIFTS = 3
"""Machines that each machine sends to, at most: the next ones in their order."""
LEAST_TO_COMPARE = 3
"""Measurements of a kind among which one can be told to be slow."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One measurement."""

    kind: str
    """`link` between two machines, or the parallel axis."""
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    """The hosts of the ranks, each once."""
    gb_s: float
    """Bytes of the message over the best time, GB/s."""


def measure(
    processes: Processes, groups: dict[str, Any], hosts: list[str], device: torch.device
) -> list[Speed]:
    """Return all measurements, the same on every process; all call this together.

    Args:
        groups: axis -> this process's group of it. hosts: of all ranks.
    """
    data = torch.zeros(BYTES[device.type] // 4, device=device)
    own = [*_links(processes, hosts, data)]
    for axis, group in groups.items():
        seconds = _best(processes, partial(_all_reduce, data, group))
        if group.rank() == 0:
            ranks = dist.get_process_group_ranks(group)
            own.append(
                Speed(axis, tuple(ranks), _once(hosts[rank] for rank in ranks), data.nbytes / seconds / 1e9)
            )
    return [speed for each in processes.gather(own) for speed in each]


def judge(speeds: list[Speed], least: float) -> list[Problem]:
    """Return the machines, links and groups that reach less than `least` of the median of their kind."""
    kinds: dict[str, list[Speed]] = defaultdict(list)
    for speed in speeds:
        kinds[speed.kind].append(speed)
    problems = []
    links = kinds.pop("link", [])
    if len(links) >= LEAST_TO_COMPARE:
        usual = statistics.median(speed.gb_s for speed in links)
        slow = [speed for speed in links if speed.gb_s < least * usual]
        hosts = _once(host for speed in links for host in speed.hosts)
        bad = [host for host in hosts if _is_slow(host, links, slow)]
        for host in bad:
            best = max(speed.gb_s for speed in slow if host in speed.hosts)
            problems.append(
                Problem(
                    f"The network of {host} is slow: {best:.3g} GB/s, where links have {usual:.3g} GB/s (median).",
                    True,
                    (host,),
                )
            )
        for speed in slow:
            if not set(speed.hosts) & set(bad):
                pair = " to ".join(speed.hosts)
                problems.append(
                    Problem(
                        f"The link from {pair} is slow: {speed.gb_s:.3g} GB/s, median {usual:.3g} GB/s.",
                        True,
                        speed.hosts[1:],
                    )
                )
    for axis, those in kinds.items():
        usual = statistics.median(speed.gb_s for speed in those)
        for speed in those:
            if len(those) >= LEAST_TO_COMPARE and speed.gb_s < least * usual:
                where = ", ".join(speed.hosts)
                problems.append(
                    Problem(
                        f"The {axis} group of ranks {', '.join(map(str, speed.ranks))} ({where}) is slow: "
                        f"{speed.gb_s:.3g} GB/s, median {usual:.3g} GB/s.",
                        True,
                        tuple(speed.hosts) if len(set(speed.hosts)) == 1 else (),
                    )
                )
    return problems


def _is_slow(host: str, links: list[Speed], slow: list[Speed]) -> bool:
    """Tell whether all links from `host`, or all to it, are slow."""
    ends = ([speed for speed in links if speed.hosts[end] == host] for end in (0, 1))
    return any(those and all(speed in slow for speed in those) for those in ends)


def _links(processes: Processes, hosts: list[str], data: torch.Tensor) -> list[Speed]:
    """Return this rank's measurements of receiving from machines before its own, if it is the first of its machine.

    In each round every machine sends to the one that is `shift` places further.
    """
    machines = _once(hosts)
    firsts = [hosts.index(machine) for machine in machines]
    count = len(machines)
    received = torch.empty_like(data)
    found = []
    for shift in range(1, min(count - 1, SHIFTS) + 1):
        if processes.rank not in firsts:
            _best(processes, None)
            continue
        place = firsts.index(processes.rank)
        to, source = firsts[(place + shift) % count], firsts[(place - shift) % count]

        def exchange(to: int = to, source: int = source) -> float:
            began = time.perf_counter()
            operations = [dist.P2POp(dist.irecv, received, source), dist.P2POp(dist.isend, data, to)]
            works = dist.batch_isend_irecv(operations)
            works[0].wait()
            _synchronize(data.device)
            took = time.perf_counter() - began  # of the link from `source`; the other one may be slower
            for work in works[1:]:
                work.wait()
            return took

        pair = (machines[(place - shift) % count], machines[place])
        seconds = _best(processes, exchange)
        found.append(Speed("link", (source, processes.rank), pair, data.nbytes / seconds / 1e9))
    return found


def _best(processes: Processes, action: Callable[[], float] | None) -> float:
    """Return the least of the seconds that `action` reports, in a first time and, if it is quick for all, the repeats.

    All processes call this together, those without an action (0 seconds) too, and begin each time together: who repeats
    an exchange alone would wait for ever, and who begins late would look slow.
    """
    best = float("inf")
    for _ in range(1 + REPEATS):
        best = min(best, 0.0 if action is None else action())
        if any(processes.gather(best > QUICK_S)):
            break
    return best


def _all_reduce(data: torch.Tensor, group: Any) -> float:
    _synchronize(data.device)
    began = time.perf_counter()
    dist.all_reduce(data, group=group)
    _synchronize(data.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(hosts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hosts))
