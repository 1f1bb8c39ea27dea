"""Processes that train, save after every step, and are killed; the next ones go on from what was saved."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from layouts import STORE
from resharding import joined_processes
from torch import distributed as dist

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import Checkpointer
from megatrain.parallel.layout import world_size
from megatrain.parallel.mesh import make_mesh
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config
from megatrain.train.step import train_step

LIMIT_S = 60.0


def live(rank: int, cfg: Config, folder: str, meeting: str, last: int, is_async: bool) -> None:
    """Train on this rank from the newest checkpoint to step `last`, with a save after each; the first notes losses."""
    size = world_size(cfg.parallel)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    processes = joined_processes(LIMIT_S)
    mesh = make_mesh(cfg.parallel, torch.device("cpu"))
    state = build_state(cfg, torch.device("cpu"), mesh)
    loader = build_loader(cfg, STORE, mesh)
    saving = CheckpointConfig(keep=2, async_save=is_async)
    checkpointer = Checkpointer(Path(folder) / "checkpoints", saving, processes)
    processes.from_first(checkpointer.remove_leftovers)
    if (found := checkpointer.load(tensors := state.tensors())) is not None:
        assert not found.warnings, found.warnings
        state.restore(found.state, tensors)
    saver = Saver(checkpointer, processes.beside("saves"))
    while state.step < last:
        loss = train_step(state, loader.step_batch(state.step), cfg, lr=cfg.optim.lr).loss.item()
        if rank == 0:
            with (Path(folder) / "losses.jsonl").open("a") as file:
                file.write(json.dumps([state.step, loss.hex()]) + "\n")
        saver.save(state.step, state.tensors, state.metadata(), {}, is_last=state.step == last)
    dist.destroy_process_group()


@contextmanager
def started(cfg: Config, folder: Path, last: int, *, is_async: bool) -> Iterator[list[BaseProcess]]:
    """The processes of one life; all have ended after the block."""
    context = multiprocessing.get_context("forkserver")  # which has imported torch
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    ranks = [
        context.Process(target=live, args=(rank, cfg, str(folder), str(meeting), last, is_async))
        for rank in range(world_size(cfg.parallel))
    ]
    for each in ranks:
        each.start()
    try:
        yield ranks
    finally:
        for each in ranks:
            each.kill()
            each.join()


def undisturbed(cfg: Config, folder: Path, last: int) -> dict[int, str]:
    """Losses of a run that nobody kills."""
    folder.mkdir()
    with started(cfg, folder, last, is_async=False) as ranks:
        for each in ranks:
            each.join(LIMIT_S)
        assert [each.exitcode for each in ranks] == [0] * len(ranks)
    return losses(folder)[0]


def killed_in_a_save(cfg: Config, folder: Path, last: int, draw: random.Random, *, is_async: bool) -> bool:
    """Live once, and be killed at a moment drawn within a save; False if the end was reached before.

    One rank is killed, or all are; the others are ended as the launcher does.
    """
    saves = folder / "checkpoints"
    with started(cfg, folder, last, is_async=is_async) as ranks:
        seen: set[str] = set()
        wanted = draw.randint(1, 3)
        limit = time.monotonic() + LIMIT_S
        while len(seen) < wanted and any(each.is_alive() for each in ranks):
            assert time.monotonic() < limit, "no save began"
            if saves.exists():
                seen |= {name for name in os.listdir(saves) if name.startswith(".tmp-step-")}
            time.sleep(0.001)  # a directory that appears, which nothing announces
        time.sleep(draw.uniform(0, 0.06))
        victims = ranks if draw.random() < 0.3 else [draw.choice(ranks)]
        for each in victims:
            if each.is_alive():
                assert each.pid is not None
                os.kill(each.pid, signal.SIGKILL)
        return any(each.is_alive() for each in ranks) or any(each.exitcode != 0 for each in ranks)


def losses(folder: Path) -> tuple[dict[int, str], list[int]]:
    """Return the loss of each step, and the steps that were repeated with another one."""
    found: dict[int, str] = {}
    differ = []
    for line in (folder / "losses.jsonl").read_text().splitlines():
        step, loss = json.loads(line)
        if found.setdefault(step, loss) != loss:
            differ.append(step)
    return found, differ
