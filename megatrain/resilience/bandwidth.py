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
QUICK_S = 0.2
"""What takes longer the first time is not repeated."""
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
        seconds = _best(processes, partial(dist.all_reduce, data, group=group), device)
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
        bad = [host for host in hosts if all(speed in slow for speed in links if host in speed.hosts)]
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


def _links(processes: Processes, hosts: list[str], data: torch.Tensor) -> list[Speed]:
    """Return this rank's measurements of sending to machines after its own, if it is the first of its machine.

    In each round every machine sends to the one that is `shift` places further.
    """
    machines = _once(hosts)
    firsts = [hosts.index(machine) for machine in machines]
    count = len(machines)
    received = torch.empty_like(data)
    found = []
    for shift in range(1, min(count - 1, SHIFTS) + 1):
        if processes.rank not in firsts:
            _best(processes, None, data.device)
        else:
            place = firsts.index(processes.rank)
            to, source = firsts[(place + shift) % count], firsts[(place - shift) % count]

            def exchange(to: int = to, source: int = source) -> None:
                operations = [dist.P2POp(dist.isend, data, to), dist.P2POp(dist.irecv, received, source)]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

            seconds = _best(processes, exchange, data.device)
            pair = (machines[place], machines[(place + shift) % count])
            found.append(Speed("link", (processes.rank, to), pair, data.nbytes / seconds / 1e9))
        processes.gather(None)  # the rounds do not overlap
    return found


def _best(processes: Processes, action: Callable[[], Any] | None, device: torch.device) -> float:
    """Return the least of the seconds that `action` takes, in a first time and, if it is quick for all, the repeats.

    All processes call this together, those without an action (0 seconds) too: who repeats an exchange alone would wait
    for ever.
    """
    best = _seconds(action, device)
    is_quick = all(processes.gather(best <= QUICK_S))
    for _ in range(REPEATS if is_quick or device.type != "cpu" else 0):  # NCCL connects in the first one
        best = min(best, _seconds(action, device))
    return best


def _seconds(action: Callable[[], Any] | None, device: torch.device) -> float:
    if action is None:
        return 0.0
    _synchronize(device)
    began = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(hosts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hosts))
