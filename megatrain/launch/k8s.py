"""A JobSet manifest: one pod a node, which Kubernetes starts, and starts again, together."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatrain.launch.config import K8sCluster
from megatrain.launch.templates import render

LONGEST_NAME = 40
"""Characters of the JobSet's name: those of its pods, which are longer, must be host names."""


def manifest(template: Path, cluster: K8sCluster, name: str, directory: str, overrides: Sequence[str]) -> str:
    """Return the manifest as YAML with comments.

    Args:
        template: `launchers/k8s/jobset.yaml`.
        name: of the run.
        directory: its run directory, relative to the volume.
        overrides: arguments of `megatrain train`.
    """
    label = object_name(name)
    values = {
        "cluster": cluster,
        "title": name,
        "name": label,
        "command": _command(cluster, label, directory, overrides),
    }
    return render(template, values)


def object_name(name: str) -> str:
    """Return the name of a run as one that Kubernetes takes: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:LONGEST_NAME].strip("-") or "run"


def _command(cluster: K8sCluster, label: str, directory: str, overrides: Sequence[str]) -> str:
    """Return the shell commands of a pod. They end with the run's own exit code, since torchrun's is always 1."""
    words = " ".join(shlex.quote(word) for word in overrides)
    status = shlex.quote(f"{directory}/status.json")
    return "\n".join(
        [
            *cluster.setup,
            "python -m torch.distributed.run \\",
            f"  --nnodes={cluster.nodes} --nproc-per-node={cluster.processes} --node-rank=$JOB_COMPLETION_INDEX \\",
            f"  --master-addr={label}-node-0-0.{label} --master-port={cluster.master_port} --max-restarts=0 \\",
            f"  -m megatrain train {words} &",
            "trap 'kill -TERM $!' TERM  # bash would keep the signal to itself, and the run would not save",
            "wait $!; code=$?",
            "while kill -0 $! 2>/dev/null; do wait $!; code=$?; done  # a signal ends the first wait",
            "[ $code = 0 ] && exit 0",
            f"own=$(sed -n 's/^ *\"exit_code\": \\([0-9]*\\).*/\\1/p' {status} 2>/dev/null)",
            '[ "${own:-0}" = 0 ] && exit $code',
            "exit $own",
        ]
    )
