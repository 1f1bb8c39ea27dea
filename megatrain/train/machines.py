"""Check of a run's machines before its first step; see `resilience.preflight`."""

import torch
from torch import distributed as dist

from megatrain.observe.communication import axes_of_groups
from megatrain.parallel.mesh import Mesh, make_mesh
from megatrain.resilience.bandwidth import judge, measure
from megatrain.resilience.config import ResilienceConfig
from megatrain.resilience.preflight import check_machines, heed, look_around
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config


def check_likeness(
    processes: Processes, cfg: ResilienceConfig, device: torch.device
) -> tuple[list[str], list[str]]:
    """Return the host of each rank, and what is to be told of the machines; none for one process.

    Raises:
        UserError: they differ in what must be equal, or one is unhealthy.
    """
    if processes.size == 1 or cfg.preflight == "off":
        return [], []
    processes.doing("comparing machines")
    found = look_around(processes, device)
    return [facts.host for facts in found], heed(check_machines(found), cfg)


def make_checked_mesh(
    cfg: Config, processes: Processes, hosts: list[str], device: torch.device
) -> tuple[Mesh | None, list[str]]:
    """Return the mesh of a run of several processes, and what is to be told of its groups and the links of machines.

    Args:
        hosts: of all ranks, if the machines are checked.

    Raises:
        UserError: a machine's network is far slower than the others'.
    """
    if processes.size == 1:
        return None, []
    mesh = make_mesh(cfg.parallel, device)
    axes = axes_of_groups(mesh)
    processes.limit_waits(cfg.resilience.timeout_s)  # in the new groups, too
    processes.describe(axes=axes, stage=mesh.coordinate("pp"))
    told: list[str] = []
    if len(set(hosts)) > 1 and cfg.resilience.least_bandwidth:
        processes.doing("measuring the network")
        groups = {axes[each.group_name]: each for each in _groups() if each.group_name in axes}
        speeds = measure(processes, groups, hosts, device)
        told = heed(judge(speeds, cfg.resilience.least_bandwidth), cfg.resilience)
    processes.doing("building the model")
    return mesh, told


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)
