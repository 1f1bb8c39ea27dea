"""A JobSet manifest: one pod a node, which Kubernetes starts, and starts again, together."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatrain.launch.config import K8sCluster
from megatrain.launch.templates import render

LONGEST_NAME = 40
"""Characters of the JobSet's name: those of its pods, which are longer, must be host names."""


def manifest(template: Path, cluster: K8sCluster, name: str, overrides: Sequence[str]) -> str:
    """Return the manifest as YAML with comments.

    Args:
        template: `launchers/k8s/jobset.yaml`.
        name: of the run.
        overrides: arguments of `megatrain train`.
    """
    label = object_name(name)
    values = {
        "cluster": cluster,
        "title": name,
        "name": label,
        "command": _command(cluster, label, overrides),
    }
    return render(template, values)


def object_name(name: str) -> str:
    """Return the name of a run as one that Kubernetes takes: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:LONGEST_NAME].strip("-") or "run"


def _command(cluster: K8sCluster, label: str, overrides: Sequence[str]) -> str:
    """Return the shell commands of a pod. They end with the run's own exit code where the user must mend something."""
    words = " ".join(shlex.quote(word) for word in overrides)
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
            "[ -s $MEGATRAIN_EXIT_FILE ] && exit $(cat $MEGATRAIN_EXIT_FILE)",
            "[ $JOB_COMPLETION_INDEX = 0 ] || sleep 10  # the first pod, which knows why, is to end first",
            "exit $code",
        ]
    )
