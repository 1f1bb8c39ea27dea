"""The processes of one node, started by torchrun, as one script for all nodes."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatrain.launch.config import SshCluster, TorchrunCluster
from megatrain.launch.record import read_status
from megatrain.launch.slurm import python
from megatrain.launch.templates import render
from megatrain.runtime.launch import passing_signals

GRACE_S = 300
"""Seconds that torchrun gives its processes to save after a signal."""


class Agent(subprocess.Popen[bytes]):
    """torchrun, which dies of SIGUSR1 and SIGUSR2 with its processes: it gets the SIGTERM that it passes on instead."""

    def send_signal(self, sig: int) -> None:
        """Send a signal."""
        super().send_signal(signal.SIGTERM if sig in (signal.SIGUSR1, signal.SIGUSR2) else sig)


def node_script(
    template: Path, cluster: TorchrunCluster | SshCluster, name: str, overrides: Sequence[str]
) -> str:
    """Return the script that starts a node's processes; it reads the node's number from NODE_RANK.

    Args:
        template: `launchers/torchrun/node.sh`.
        name: of the run.
        overrides: arguments of `megatrain train`.
    """
    hosts = cluster.host_names if isinstance(cluster, SshCluster) else ()
    values = {
        "cluster": cluster,
        "cluster_nodes": len(hosts) or cluster.nodes,
        "master_addr": cluster.master_addr or (hosts[0].rpartition("@")[2] if hosts else "127.0.0.1"),
        "grace_s": cluster.grace_s if isinstance(cluster, SshCluster) else GRACE_S,
        "directory": os.getcwd(),
        "python": python(cluster.venv, None),
        "name": name,
        "overrides": overrides,
    }
    return render(template, values)


def run_node(script: str, node_rank: int, directory: Path) -> int:
    """Run a node's script here until it ends; return the exit code of the run in `directory` where it is known."""
    before = read_status(directory)
    command = ["bash", "-c", script]
    with Agent(command, env=os.environ | {"NODE_RANK": str(node_rank)}) as agent, passing_signals([agent]):
        code = agent.wait()
    return outcome(code, directory, attempt=before.attempt if before else 0)


def outcome(code: int, directory: Path, *, attempt: int) -> int:
    """Return the exit code of the run, since torchrun's is 1 whatever happened; `code` if there was no new attempt.

    Args:
        attempt: number of the run's attempts before.
    """
    record = read_status(directory)
    if record is None or record.attempt == attempt or record.exit_code is None:
        return code if code >= 0 else 128 - code
    return record.exit_code
