"""Machines leave and come back under torchrun's elasticity: the same samples in the same order, the same run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from workplace import Workplace, wait_for_rows

BOUNDS = {100: 1e-8, 300: 1e-3}
"""By the last step: float64 sums in another order differ by 1e-16, which training amplifies by 100 in 30 steps."""
STEPS = 300
"""Enough for an agent to start meanwhile: a step takes about 0.1 s."""
RUN = (
    "model.hidden_size=64",
    "model.ffn_size=256",
    "model.n_layers=4",
    "seq_len=64",
    "global_batch_size=4",
    "train.precision=fp64",
    f"train.steps={STEPS}",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "checkpoint.every=10",
    "checkpoint.keep=2",
    "resilience.timeout_s=20",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_listening(process: subprocess.Popen[str], port: int) -> None:
    limit = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)  # a port, which nothing announces


@contextmanager
def agent(workplace: Workplace, port: int, log: str) -> Iterator[subprocess.Popen[str]]:
    """A torchrun agent that stands for a machine, with a process group of its own."""
    line = workplace.tiny("run.name=elastic", *RUN, "parallel.dp_shard=-1")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"),
        *("--max-restarts=9", "--rdzv-id=elastic", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=8,join_timeout=120"),
        *line[1:],
    ]
    with (workplace.folder / log).open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=workplace.folder,
            # Else an agent that stays as the first one tells newcomers no address (dynamic_rendezvous.py, torch 2.13).
            env={**workplace.environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=file,
            stderr=file,
            text=True,
            process_group=0,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def starts(run: Path) -> list[dict[str, Any]]:
    """Attempts of the run: on how many processes, from which step."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [each for each in events if each["event"] in ("start", "resume")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_machine_leaves_and_another_comes(workplace: Workplace) -> None:
    workplace.run(workplace.tiny("run.name=one", *RUN))
    run, port = workplace.folder / "runs" / "elastic", free_port()
    metrics = run / "metrics.jsonl"
    with ExitStack() as stack:
        first = stack.enter_context(agent(workplace, port, "first.log"))
        wait_until_listening(
            first, port
        )  # the agent that comes first has the store, and must be the one that stays
        second = stack.enter_context(agent(workplace, port, "second.log"))
        assert wait_for_rows(first, metrics, 25), (workplace.folder / "first.log").read_text()
        os.killpg(second.pid, signal.SIGKILL)  # the machine is gone, with its agent and its process
        reached = metrics.read_bytes().count(b"\n")
        assert wait_for_rows(first, metrics, reached + 12), (workplace.folder / "first.log").read_text()
        stack.enter_context(agent(workplace, port, "third.log"))
        assert first.wait(600) == 0, (workplace.folder / "first.log").read_text()
    attempts = starts(run)
    assert [each["machine"]["processes"] for each in attempts] == [2, 1, 2]
    assert attempts[2]["lost"]["steps"] == 0, "the steps before another machine came were not saved"
    rows, truth = workplace.rows("elastic"), workplace.rows("one")
    assert [row["step"] for row in rows] == [row["step"] for row in truth]
    assert [row["data/sample_digest"] for row in rows] == [row["data/sample_digest"] for row in truth]
    for row, wanted in zip(rows, truth, strict=True):
        bound = next(bound for step, bound in BOUNDS.items() if row["step"] <= step)
        assert row["train/loss"] == pytest.approx(wanted["train/loss"], rel=bound), row["step"]
