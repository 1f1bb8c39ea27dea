"""`megatrain doctor --cluster`: the machines of a job, compared, and the network between them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.config.errors import UserError
from megatrain.resilience.config import ResilienceConfig
from megatrain.runtime.processes import Processes, is_started
from megatrain.runtime.slurm import name_task

if TYPE_CHECKING:
    from megatrain.resilience.bandwidth import Speed
    from megatrain.resilience.machine_facts import MachineFacts
    from megatrain.resilience.preflight import Problem


def run(*, as_json: bool, unfit: Path | None = None) -> int:
    """Check the machines on which a launcher has started this; return 1 if one is unfit, else 0.

    Args:
        unfit: a file to write, with the name of an unfit machine on each line.

    Raises:
        UserError: no launcher has started several processes.
    """
    name_task()
    if not is_started():
        raise UserError(
            "--cluster compares the machines of a job: start it with the launcher that starts the job, as in "
            "`torchrun --nnodes=2 ... -m megatrain doctor --cluster` or `srun ... megatrain doctor --cluster`."
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when it is imported
    from megatrain.resilience.bandwidth import judge
    from megatrain.resilience.preflight import check_machines, look_around
    from megatrain.runtime.device import pick_device
    from megatrain.runtime.group import joined  # imports torch

    with joined() as processes:
        device = pick_device(processes.local_rank)
        found = look_around(processes, device)
        problems = check_machines(found)
        speeds = _speeds(processes, [facts.host for facts in found], device)
        problems += judge(speeds, ResilienceConfig().least_bandwidth)
        if processes.is_first:
            (_print_json if as_json else _print)(found, speeds, problems)
            if unfit is not None:
                hosts = dict.fromkeys(host for each in problems if each.is_fatal for host in each.hosts)
                unfit.write_text("".join(f"{host}\n" for host in hosts))
        return 1 if any(problem.is_fatal for problem in problems) else 0


def _speeds(processes: Processes, hosts: list[str], device: Any) -> "list[Speed]":
    """Measure links between machines, groups of the processes of one machine, and the group of all."""
    from torch import distributed as dist

    from megatrain.resilience.bandwidth import measure

    if processes.size == 1:
        return []
    groups = {"all ranks": dist.group.WORLD}
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, each in enumerate(hosts) if each == host]
        group = dist.new_group(ranks) if 1 < len(ranks) < processes.size else None
        if group is not None and processes.rank in ranks:
            groups["within a machine"] = group
    return measure(processes, groups, hosts, device)


def _print_json(found: "list[MachineFacts]", speeds: "list[Speed]", problems: "list[Problem]") -> None:
    print(
        json.dumps(
            {
                "processes": [asdict(each) for each in found],
                "bandwidth": [asdict(each) for each in speeds],
                "problems": [asdict(each) for each in problems],
            },
            indent=2,
        )
    )


def _print(found: "list[MachineFacts]", speeds: "list[Speed]", problems: "list[Problem]") -> None:
    print("machines")
    for host in dict.fromkeys(facts.host for facts in found):
        those = [facts for facts in found if facts.host == host]
        free = ", ".join(f"{amount:.0f} GiB {place}" for place, amount in those[0].free_gib.items())
        versions = ", ".join(f"{name} {version}" for name, version in those[0].versions.items())
        ranks = ", ".join(str(facts.rank) for facts in those)
        print(f"  {host}: ranks {ranks}; {those[0].device}; free: {free}")
        print(f"    {versions}; code {those[0].code}")
    if speeds:
        print("bandwidth of one message, GB/s")
    for speed in speeds:
        where = " to ".join(speed.hosts) if speed.kind == "link" else ", ".join(speed.hosts)
        print(f"  {speed.kind:<17} {where}: {speed.gb_s:.3g}")
    for problem in problems:
        print(f"{'unfit' if problem.is_fatal else 'note'}: {problem.text}")
    if not any(problem.is_fatal for problem in problems):
        print("The machines are alike and fit for a run.")
