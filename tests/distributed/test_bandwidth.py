"""Bandwidth between machines is measured by all ranks together, also where it is slow for some of them only."""

import pytest
import torch
from resharding import joined_processes
from torch import distributed as dist

from megatrain.resilience import bandwidth
from megatrain.runtime.workers import WorkerPool

HOSTS = ["a", "a", "b", "c", "d"]


def measured(slow_rank: int) -> list[bandwidth.Speed]:
    """All measurements, where `slow_rank` alone finds every exchange slow."""
    rank = dist.get_rank()
    before, bandwidth.QUICK_S = bandwidth.QUICK_S, 0.0 if rank == slow_rank else 100.0
    try:
        groups = {"dp_shard": dist.group.WORLD}
        return bandwidth.measure(joined_processes(20), groups, HOSTS, torch.device("cpu"))
    finally:
        bandwidth.QUICK_S = before


@pytest.mark.parametrize("slow_rank", [1, 3])
def test_a_slow_exchange_is_repeated_by_all_or_nobody(workers: WorkerPool, slow_rank: int) -> None:
    """Rank 1 is the second one of its machine, which takes no part in the exchanges."""
    found = workers.run(measured, len(HOSTS), slow_rank)
    assert all(each == found[0] for each in found)
    links = {speed.hosts for speed in found[0] if speed.kind == "link"}
    assert links == {(one, other) for one in "abcd" for other in "abcd" if one != other}
    assert [speed.hosts for speed in found[0] if speed.kind != "link"] == [("a", "b", "c", "d")]
