"""Saves in the background of two ranks, with collectives of training beside them."""

from pathlib import Path
from unittest import mock

import torch
from resharding import joined_processes
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatrain.checkpoint import store
from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.errors import CheckpointSaveError
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import Checkpointer
from megatrain.runtime.workers import WorkerPool

STEPS = 40


def tensors_of(step: int) -> dict[str, Tensor]:
    """Evenly and unevenly sharded ones, one that every rank has, and one that only its rank has."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    draw = torch.Generator().manual_seed(step)
    found: dict[str, Tensor] = {
        f"sharded.{rows}": distribute_tensor(torch.randn(rows, 8, generator=draw), mesh, [Shard(0)])
        for rows in (64, 7, 1)
    }
    return found | {
        "replicated": torch.randn(5, generator=draw),
        f"own.{dist.get_rank()}": torch.ones(3) * step,
    }


def train(saver: Saver, tensors: dict[str, Tensor], until: int) -> int:
    """Change the tensors in steps that end with a vote, as a run does; return the steps that were done."""
    for step in range(1, until + 1):
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
        vote = torch.tensor(float(saver.has_failed()))
        dist.all_reduce(vote)
        if vote > 0:
            try:
                saver.settle()
            except CheckpointSaveError:
                return step
    return until


def saves(folder: Path, failures_of_rank_1: int) -> tuple[list[tuple[str, int]], int]:
    """Save step 1 in the background and step 2 as the last one; return the reports and how far training came."""
    processes = joined_processes()
    checkpointer = Checkpointer(folder / "async", CheckpointConfig(async_save=True))
    checkpointer = Checkpointer(folder / "async", checkpointer.cfg, processes)
    saver = Saver(checkpointer, processes.beside("saves"))
    left = [failures_of_rank_1 if processes.rank == 1 else 0]
    write = store.write_tensors

    def write_or_fail(directory: Path, tensors: dict[str, Tensor], *options: object) -> object:
        found = write(directory, tensors, *options)
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return found

    tensors = tensors_of(1)
    with mock.patch.object(store, "write_tensors", write_or_fail):
        saver.save(1, lambda: tensors, {"step": 1}, {}, is_last=False)
        done = train(saver, tensors, STEPS) if failures_of_rank_1 < 2 else train(saver, tensors, 10**6)
        saver.save(2, lambda: tensors_of(2), {"step": 2}, {}, is_last=True)
    plain = Checkpointer(folder / "sync", CheckpointConfig(), processes)
    for step in (1, 2):
        plain.save(step, tensors_of(step), {"step": step})
    return [(report.outcome, report.facts["step"]) for report in saver.reports()], done


def files(checkpoint: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in checkpoint.iterdir() if f.name != "manifest.json"}


def test_values_are_those_of_the_step(workers: WorkerPool, tmp_path: Path) -> None:
    reports, done = workers.run(saves, 2, tmp_path, 0)[0]
    assert (reports, done) == ([("saved", 1), ("saved", 2)], STEPS)
    for step in ("step-00000001", "step-00000002"):
        assert files(tmp_path / "async" / step) == files(tmp_path / "sync" / step)


def test_a_failure_of_one_rank_ends_all_at_the_same_step(workers: WorkerPool, tmp_path: Path) -> None:
    """Rank 1 fails twice: both ranks try again together, and both give up at the same step."""
    (reports, done), (others, others_done) = workers.run(saves, 2, tmp_path, 2)
    assert reports == [("failed", 1), ("saved", 2)]
    assert others == reports
    assert 1 < done == others_done
    assert sorted(path.name for path in (tmp_path / "async").iterdir()) == ["step-00000002"]
