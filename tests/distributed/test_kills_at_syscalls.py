"""A process killed at every system call by which a save of two processes changes files; strace does it.

Each life loads the newest checkpoint, and is killed as it saves the next one and prunes the one before.
"""

import itertools
import multiprocessing
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from layouts import RUNS, with_layout
from resharding import joined_processes
from torch import distributed as dist

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.inspect import require_whole
from megatrain.checkpoint.retention import committed_steps, step_name
from megatrain.checkpoint.store import Checkpointer
from megatrain.parallel.mesh import make_mesh
from megatrain.train.build import build_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("strace") is None, reason="it needs strace"),
]
# strace counts the calls of each thread by itself. Kind by kind, the threads that write are told from the one that
# commits.
CALLS = (
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "mkdir",
    "rename",
    "renameat",
    "link",
    "unlink",
    "unlinkat",
    "rmdir",
)
LIMIT_S = 60.0
LAYOUT = {"dp_shard": 2}


def live(rank: int, folder: str, port: int, pipe: Connection) -> None:
    """Load the newest checkpoint, say so, and save the next one as soon as the test says so."""
    cfg = with_layout(RUNS["untied"], "fp64", LAYOUT)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes = joined_processes(LIMIT_S)
    state = build_state(cfg, torch.device("cpu"), make_mesh(cfg.parallel, torch.device("cpu")))
    checkpointer = Checkpointer(Path(folder) / "checkpoints", CheckpointConfig(keep=1), processes)
    processes.from_first(checkpointer.remove_leftovers)
    tensors = state.tensors()
    if (found := checkpointer.load(tensors)) is not None:
        assert not found.warnings, found.warnings
        state.restore(found.state, tensors)
        state.step += 1
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(state.step)
    pipe.send("ready")
    pipe.recv()
    checkpointer.save(state.step, tensors, state.metadata(), {})
    pipe.send("saved")
    dist.destroy_process_group()


def life(folder: Path, victim: int, call: str, n: int) -> tuple[bool, str]:
    """Live once, with rank `victim` killed at a thread's `n`-th `call` (0: not); whether it was, and at which line."""
    context = multiprocessing.get_context("forkserver")  # which has imported torch
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # neither rank writes for it
    ranks: list[tuple[BaseProcess, Connection]] = []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=live, args=(rank, str(folder), store.port, there))
        process.start()
        there.close()
        ranks.append((process, here))
    tracer, log = None, folder / "strace.log"
    try:
        for _, pipe in ranks:
            assert pipe.recv() == "ready"
        if n:
            pid = ranks[victim][0].pid
            inject = f"inject={call}:signal=SIGKILL:when={n}"
            tracer = subprocess.Popen(
                [
                    "strace",
                    "-f",
                    "-qq",
                    "-y",
                    "-p",
                    str(pid),
                    "-o",
                    str(log),
                    "-e",
                    f"trace={call}",
                    "-e",
                    inject,
                ]
            )
            while any(
                "TracerPid:\t0" in each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/status")
            ):
                time.sleep(0.01)  # it attaches to each thread, which nothing announces
        for _, pipe in ranks:
            pipe.send("go")
        process, pipe = ranks[victim]
        try:
            assert pipe.recv() == "saved"
            return False, ""
        except EOFError:
            process.join(LIMIT_S)
            assert process.exitcode == -signal.SIGKILL
            called = re.findall(r"^\d+\s+(\w+\(.*)$", log.read_text(), re.MULTILINE)
            return True, called[-1]
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
        if tracer is not None:
            tracer.wait()


def newest(folder: Path) -> int:
    """Check that every checkpoint is whole; return the newest one's step."""
    steps = committed_steps(folder / "checkpoints")
    for step in steps:
        require_whole(folder / "checkpoints" / step_name(step), progress=lambda name, share: None)
    return max(steps)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_every_call(tmp_path: Path, victim: int) -> None:
    assert life(tmp_path, victim, "write", 0) == (False, "")
    before, kills = newest(tmp_path), Counter[str]()
    for call in CALLS:
        for n in itertools.count(1):
            killed, line = life(tmp_path, victim, call, n)
            step = newest(tmp_path)
            assert step in (before, before + 1) if killed else step == before + 1
            before = step
            if not killed:
                break
            kills[call] += 1
            print(f"rank {victim}, {call} {n}: newest is {step}; {line}", flush=True)
    print(f"rank {victim}: killed at {kills.total()} calls: {dict(kills)}")
    assert {"write", "fsync"} <= kills.keys()
    assert victim or {"rename", "unlinkat"} <= kills.keys()
