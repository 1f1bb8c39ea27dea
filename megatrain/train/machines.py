"""Check of a run's machines before its first step; see `resilience.preflight`."""

import torch
from torch import distributed as dist

from megatrain.observe.communication import axes_of_groups
from megatrain.parallel.mesh import Mesh
from megatrain.resilience.bandwidth import judge, measure
from megatrain.resilience.config import ResilienceConfig
from megatrain.resilience.preflight import check_machines, heed, look_around
from megatrain.runtime.processes import Processes


def check_likeness(
    processes: Processes, cfg: ResilienceConfig, device: torch.device
) -> tuple[list[str], list[str]]:
    """Return the host of each rank, and what is to be told of the machines; none for one process.

    Raises:
        UserError: they differ in what must be equal, or one is unhealthy.
    """
    if processes.size == 1 or cfg.preflight == "off":
        return [], []
    found = look_around(processes, device)
    return [facts.host for facts in found], heed(check_machines(found), cfg)


def check_links(
    processes: Processes, cfg: ResilienceConfig, mesh: Mesh | None, *, hosts: list[str], device: torch.device
) -> list[str]:
    """Return what is to be told of the links between several machines, and of the groups of the mesh.

    Raises:
        UserError: a machine's network is far slower than the others'.
    """
    if mesh is None or len(set(hosts)) < 2 or not cfg.least_bandwidth:
        return []
    axes = axes_of_groups(mesh)
    groups = {
        axes[group.group_name]: group
        for group in dist.distributed_c10d._world.pg_map
        if group.group_name in axes
    }
    return heed(judge(measure(processes, groups, hosts, device), cfg.least_bandwidth), cfg)
