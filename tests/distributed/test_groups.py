"""Process groups: each is made once, for an axis that has ranks and is used, and all of them give up in time."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.runtime.group import JoinedProcesses
from megatrain.runtime.meetings import Meetings
from megatrain.runtime.workers import WorkerPool


def groups_made(cfg: ParallelConfig, timeout_s: float) -> list[tuple[tuple[int, ...], float]]:
    """Ranks and time-out of each group that this rank is in and that sends, the default group apart."""
    default = dist.group.WORLD
    assert default is not None
    make_mesh(cfg, torch.device("cpu"))
    meetings = Meetings(dist.distributed_c10d._get_default_store(), 0, 1, timeout_s=1.0)
    JoinedProcesses(meetings=meetings).limit_waits(timeout_s)
    found = []
    for group, (backend, _) in dist.distributed_c10d._world.pg_map.items():
        limit: timedelta = (
            timedelta() if backend == "fake" else group._get_backend(torch.device("cpu")).options._timeout
        )
        if backend != "fake":
            assert limit == timedelta(seconds=timeout_s)
            if group is not default:
                found.append((tuple(dist.get_process_group_ranks(group)), limit.total_seconds()))
    return sorted(found)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ({"dp_shard": 2}, 0),  # the default group itself
        ({"pp": 2, "tp": 2, "zero_stage": 0}, 3),  # FSDP gathers over its shard of one rank
        pytest.param({"pp": 2, "dp_shard": 2, "tp": 2}, 3, marks=pytest.mark.slow),
        pytest.param(
            {"dp_replicate": 2, "dp_shard": 2, "cp": 2}, 3, marks=pytest.mark.slow
        ),  # shards are 4 ranks
        ({"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4}, 5),  # shards, cp, tp; shards of experts, ep
    ],
    ids=str,
)
def test_each_group_is_made_once(workers: WorkerPool, layout: dict[str, Any], axes: int) -> None:
    cfg = ParallelConfig(**layout)
    for made in workers.run(groups_made, world_size(cfg), cfg, 33.0):
        assert len(made) == axes, made
        assert all(seconds == 33.0 for _, seconds in made)
