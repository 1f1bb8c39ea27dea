"""Descriptions of clusters: what a launch needs to know of a site. A file `conf/cluster/NAME.yaml` holds one.

Every key is a flag of `megatrain launch`, too: `gpus_per_node: 4` is `--gpus-per-node 4`, which wins over the file.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.paths import PathText
from megatrain.config.ranges import Count, Range, Size
from megatrain.config.schema import Problem, config

Port = Annotated[int, Range(at_least=1, at_most=65535)]
Seconds = Annotated[int, Range(at_least=1, at_most=86400)]
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


@config
class Cluster:
    """What all kinds of launches have in common."""

    nodes: Size = 1
    """Number of nodes (machines)."""
    gpus_per_node: Count = 8
    """GPUs of each node that the run uses; 0: none, it computes on CPUs."""
    processes_per_node: Size | Literal["auto"] = "auto"
    """Processes on each node; auto: one for each GPU, or one on a node without."""
    venv: PathText | None = None
    """Python environment with MegaTrain, at the same path on every node; null: the one that runs this command."""
    container: str | None = None
    """Container image in which the processes run; null: none."""
    mounts: tuple[str, ...] = ()
    """Directories of the host that the container sees, in addition to the working directory; each DIR or FROM:TO."""
    interface: str | None = None
    """Network interface over which the nodes reach each other, such as eth0; null: the one that leads to another
    node."""
    env: tuple[str, ...] = ()
    """Environment variables of the processes; each NAME=VALUE."""
    setup: tuple[str, ...] = ()
    """Shell commands that run on a node before the processes start."""

    @property
    def processes(self) -> int:
        """Processes on each node."""
        if self.processes_per_node == "auto":
            return max(1, self.gpus_per_node)
        return self.processes_per_node

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    def problems(self) -> Iterator[Problem]:
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            rule = (
                f"must not exceed gpus_per_node: two processes can't share one of {self.gpus_per_node} GPUs"
            )
            yield Problem("processes_per_node", self.processes_per_node, rule, (self.gpus_per_node,))
        for text in self.env:
            if not VARIABLE.fullmatch(text):
                yield Problem("env", text, "must be NAME=VALUE")
        if self.mounts and self.container is None:
            yield Problem("mounts", self.mounts, "requires a container", ((),))
        if self.venv is not None and self.container is not None:
            yield Problem(
                "venv", self.venv, "can't be used in a container, which has a Python of its own", (None,)
            )


@config
class SlurmCluster(Cluster):
    """A cluster under SLURM."""

    kind: Literal["slurm"] = "slurm"
    time: str = "24:00:00"
    """Time limit of a job, as SLURM reads it: minutes, hours:minutes:seconds or days-hours:minutes:seconds."""
    partition: str | None = None
    """Partition; null: the site's default. So are account, qos, reservation and constraint."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    reservation: str | None = None
    """Reservation."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes that must not be used, such as node[7,12]."""
    cpus_per_node: Count = 0
    """CPUs of each node that the job asks for; 0: those of the site's default, or all if `exclusive`."""
    mem: str | None = "0"
    """Memory of each node; "0": all of it; null: the site's default."""
    exclusive: bool = True
    """Share nodes with no other job, which would take memory bandwidth and cores."""
    tasks: Literal["torchrun", "srun"] = "torchrun"
    """Who starts the processes of a node. torchrun: one task a node, whose agent starts them; srun: SLURM itself, one
    task a process: fewer parts, and signals reach the processes directly."""
    container_kind: Literal["apptainer", "pyxis"] = "apptainer"
    """Program that runs the container. pyxis: enroot, by SLURM's plugin pyxis."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    signal_s: Seconds = 300
    """Seconds before the time limit at which the run is asked to save and stop; must cover a step and a save."""
    requeue: bool = True
    """Submit the job again when the run was stopped with everything saved, or failed and may do better."""
    spare_nodes: Count = 0
    """Nodes beyond `nodes` that a job asks for, so that unfit ones can be left out: all are compared and measured first
    (`megatrain doctor --cluster`), and the run takes those that are fit."""
    max_restarts: Count = 3
    """Restarts in a row without a newer checkpoint after which the job gives up."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as --comment=mine."""

    def problems(self) -> Iterator[Problem]:
        yield from Cluster.problems(self)
        minutes = limit_minutes(self.time)
        if minutes is None:
            rule = "must be minutes, hours:minutes:seconds or days-hours:minutes:seconds"
            yield Problem("time", self.time, rule, ("60", "24:00:00", "2-00:00:00"))
        elif minutes * 60 <= self.signal_s:
            yield Problem("signal_s", self.signal_s, f"must be less than the time limit ({self.time})")
        for text in self.sbatch:
            if not text.startswith("-") or "\n" in text:
                yield Problem("sbatch", text, "must be an option of sbatch, such as --comment=mine")


@config
class TorchrunCluster(Cluster):
    """Machines on each of which somebody, or another program, starts torchrun."""

    kind: Literal["torchrun"] = "torchrun"
    master_addr: str | None = None
    """Address of the first machine, as the others reach it."""
    master_port: Port = 29400
    """Port of the first machine that is free, and open to the others."""
    node_rank: Count | None = None
    """Which of the machines this is, from 0: run its part here; null: print the lines of all."""

    def problems(self) -> Iterator[Problem]:
        yield from Cluster.problems(self)
        if self.nodes > 1 and self.master_addr is None:
            yield Problem("master_addr", None, "must be given for several nodes: the first one's address")
        if self.node_rank is not None and self.node_rank >= self.nodes:
            yield Problem("node_rank", self.node_rank, f"must be less than nodes ({self.nodes})")
        if self.container is not None:
            yield Problem(
                "container", self.container, "start torchrun inside of the container instead", (None,)
            )


@config
class SshCluster(Cluster):
    """Machines that this one reaches over ssh, without a password."""

    kind: Literal["ssh"] = "ssh"
    hosts: str = ""
    """Names of the hosts, as ssh takes them, separated by commas; their number is the number of nodes."""
    master_addr: str | None = None
    """Address of the first host, as the others reach it; null: its name in `hosts`."""
    master_port: Port = 29400
    """Port of the first host that is free, and open to the others."""
    ssh: tuple[str, ...] = ()
    """Further options of ssh, such as -p2222."""
    grace_s: Seconds = 300
    """Seconds that the other hosts have to save and end after one has ended."""

    @property
    def host_names(self) -> tuple[str, ...]:
        """The hosts, the first of which is the master."""
        return tuple(name.strip() for name in self.hosts.split(",") if name.strip())

    @property
    def world_size(self) -> int:
        """Processes on all hosts."""
        return len(self.host_names) * self.processes

    def problems(self) -> Iterator[Problem]:
        yield from Cluster.problems(self)
        if not self.host_names:
            yield Problem("hosts", self.hosts, "must name the hosts, such as node1,node2")
        if self.nodes not in (1, len(self.host_names)):
            rule = f"must be the number of hosts ({len(self.host_names)}), or be left out"
            yield Problem("nodes", self.nodes, rule, (len(self.host_names),))
        if len(set(self.host_names)) < len(self.host_names):
            yield Problem("hosts", self.hosts, "must not name a host twice; use processes_per_node")
        if self.container is not None:
            yield Problem(
                "container", self.container, "is not supported over ssh; name the command in setup", (None,)
            )


@config
class K8sCluster(Cluster):
    """A Kubernetes cluster with the JobSet controller (https://jobset.sigs.k8s.io)."""

    kind: Literal["k8s"] = "k8s"
    namespace: str = "default"
    """Namespace of the JobSet."""
    volume: str | None = None
    """PersistentVolumeClaim that all pods can write to (ReadWriteMany); it holds the run directories."""
    volume_path: str = "/mnt/runs"
    """Directory where pods see the volume; the working directory of the processes."""
    cpus: Count = 0
    """CPUs that a pod asks for; 0: not said."""
    memory: str | None = None
    """Memory that a pod asks for, such as 512Gi."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that stands for a GPU."""
    node_selector: tuple[str, ...] = ()
    """Labels that nodes must have; each NAME=VALUE."""
    queue: str | None = None
    """Kueue's local queue, which admits all pods together; null: none."""
    signal_s: Seconds = 300
    """Seconds that a pod has to save between the signal that ends it and its end."""
    max_restarts: Count = 20
    """Restarts of all pods after a failure or an eviction, in all."""
    master_port: Port = 29400
    """Port of the first pod on which the processes meet."""

    def problems(self) -> Iterator[Problem]:
        yield from Cluster.problems(self)
        if self.container is None:
            yield Problem("container", None, "must name the image that the pods run")
        if self.volume is None:
            yield Problem(
                "volume", None, "must name a claim: checkpoints must outlive the pods, and all write them"
            )
        for text in self.node_selector:
            if not re.fullmatch(r"[^=\s]+=[^=\s]*", text):
                yield Problem("node_selector", text, "must be NAME=VALUE")


@config
class LocalCluster(Cluster):
    """This machine."""

    kind: Literal["local"] = "local"
    gpus_per_node: Count = 0
    """GPUs that the run uses; the processes are those of the layout."""


AnyCluster = SlurmCluster | TorchrunCluster | SshCluster | K8sCluster | LocalCluster
CLUSTERS: dict[str, type[AnyCluster]] = {
    "local": LocalCluster,
    "torchrun": TorchrunCluster,
    "slurm": SlurmCluster,
    "k8s": K8sCluster,
    "ssh": SshCluster,
}


def limit_minutes(text: str) -> float | None:
    """Return a SLURM time limit in minutes; None if it is not one."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(each) for each in rest if each is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)
