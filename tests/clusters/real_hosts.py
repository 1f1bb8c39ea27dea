"""A real SLURM of three hosts on this machine: each slurmd in network, host-name and mount namespaces of its own.

Bringing it up takes two seconds. It needs root, network namespaces and Debian's packages slurm-wlm and munge; without
them these tests are skipped.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LOGIN, HOSTS = "login", ("h1", "h2", "h3")
NETWORK = "10.77.0"
ADDRESSES = {"h1": f"{NETWORK}.1", "h2": f"{NETWORK}.2", "h3": f"{NETWORK}.3", LOGIN: f"{NETWORK}.254"}
INSIDE = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
CONF = """
ClusterName=test
SlurmctldHost=login({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={root}/prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=15
SlurmdTimeout=30
SlurmctldTimeout=10
MessageTimeout=4
TCPTimeout=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=h1 NodeHostname=h1 NodeAddr={NETWORK}.1 CPUs=4 State=UNKNOWN
NodeName=h2 NodeHostname=h2 NodeAddr={NETWORK}.2 CPUs=4 State=UNKNOWN
NodeName=h3 NodeHostname=h3 NodeAddr={NETWORK}.3 CPUs=4 State=UNKNOWN
PartitionName=wide Nodes=h[1-3] MaxTime=INFINITE State=UP
PartitionName=low Nodes=h[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=h[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""cred_expire is also what makes a requeued job wait, two minutes by default; the least is 5 s."""
PROLOG = """#!/bin/bash
[ -z "$SLURM_STEP_NUM_TASKS" ] || [ ! -e "{root}/odd-$SLURMD_NODENAME" ] || echo "export PYTORCH_ODD=1"
"""
"""It gives the tasks of a node for which there is a file `odd-NAME` another environment than the others have.
Not its batch script, whose environment all tasks inherit."""


@dataclass
class Hosts:
    """Hosts that reach each other over a bridge, and whose names nobody else knows."""

    root: Path
    prefix: str
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, host: str, *words: str) -> list[str]:
        """The command line that runs `words` on a host."""
        namespace = f"/run/netns/{self.prefix}{host}"
        apart = ["unshare", "--uts", "--mount", "--propagation", "private"]
        return [
            "nsenter",
            f"--net={namespace}",
            *apart,
            "bash",
            "-c",
            INSIDE,
            host,
            f"{self.root}/hosts",
            *words,
        ]

    def start(self, host: str, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a program on a host; its output goes to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(host, *words),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
            )

    def run(
        self, host: str, *words: str, cwd: Path | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host until it ends."""
        return subprocess.run(
            self.command(host, *words), cwd=cwd, env=os.environ | self.environment, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@dataclass
class Slurm(Hosts):
    """The cluster; its clients run on the host `login`, which has no slurmd."""

    def say(self, *words: str) -> str:
        """What a command of SLURM prints."""
        done = self.run(LOGIN, *words, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.say("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def restarts(self, job: str) -> int:
        return int(self.say("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])


def wait_until(condition: object, what: str, seconds: float = 240) -> None:
    """Wait until a function returns something true; a file system and a scheduler have no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def missing(programs: Sequence[str]) -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"needs {', '.join(absent)}" if absent else ""


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Hosts on one network, and the login node."""
    if why := missing(["ip", "nsenter", "unshare"]):
        pytest.skip(why)
    prefix = f"mt{secrets.token_hex(2)}"
    root = Path(tempfile.mkdtemp(prefix="clusters-"))
    root.chmod(0o755)  # munged runs as another user
    (root / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
    )
    switch = f"{prefix}{LOGIN}"
    lines = [f"netns add {prefix}{host}" for host in ADDRESSES]
    lines += [f"-n {prefix}{host} link set lo up" for host in ADDRESSES]
    lines += [f"-n {switch} link add br0 type bridge", f"-n {switch} link set br0 up"]
    lines += [f"-n {switch} addr add {ADDRESSES[LOGIN]}/24 dev br0"]
    for host in HOSTS:
        lines += [
            f"link add {prefix}{host} type veth peer name {prefix}{host}p",
            f"link set {prefix}{host} netns {prefix}{host}",
            f"link set {prefix}{host}p netns {switch}",
            f"-n {prefix}{host} link set {prefix}{host} name eth0",
            f"-n {switch} link set {prefix}{host}p master br0 up",
            f"-n {prefix}{host} addr add {ADDRESSES[host]}/24 dev eth0",
            f"-n {prefix}{host} link set eth0 up",
        ]
    try:
        for line in lines:
            done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces: ip {line}: {done.stderr.strip()}")
        yield Hosts(root, prefix)
    finally:
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", f"{prefix}{host}"], capture_output=True, check=False)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    """The cluster, with all nodes idle."""
    if why := missing(["slurmctld", "slurmd", "munged", "sbatch"]):
        pytest.skip(f"{why}: apt-get install slurm-wlm munge")
    root = hosts.root
    for name in ("state", "spool", "log", "run", "munge", *(f"spool/{host}" for host in HOSTS)):
        (root / name).mkdir()
    (root / "slurm.conf").write_text(CONF.format(root=root, address=ADDRESSES[LOGIN], NETWORK=NETWORK))
    (root / "prolog").write_text(PROLOG.format(root=root))
    (root / "prolog").chmod(0o755)
    cluster = Slurm(root, hosts.prefix, {"SLURM_CONF": str(root / "slurm.conf")})
    with contextlib.ExitStack() as stack:
        munged = _munged(root / "munge")
        stack.callback(end, munged)
        wait_until((root / "munge" / "socket").exists, "munged", 10)
        daemons = [(LOGIN, "/usr/sbin/slurmctld", "-D", "-i")]
        daemons += [(host, "/usr/sbin/slurmd", "-D", "-N", host) for host in HOSTS]
        for host, *words in daemons:
            stack.callback(end, cluster.start(host, *words, log=root / "log" / f"{host}.out"))

        def nodes_are_idle() -> bool:
            done = cluster.run(
                LOGIN, "sinfo", "--noheader", "--Node", "--partition=wide", "--format=%T", timeout=30
            )
            return done.stdout.split() == ["idle"] * len(HOSTS)

        wait_until(nodes_are_idle, "slurm", 30)
        yield cluster


def _munged(folder: Path) -> subprocess.Popen[bytes]:
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    for path in (folder, folder / "key"):
        shutil.chown(path, "munge", "munge")
    files = [f"--{name}={folder}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    with (folder.parent / "log" / "munged.out").open("wb") as log:
        return subprocess.Popen(
            ["/usr/sbin/munged", "--foreground", f"--key-file={folder}/key", *files],
            user="munge", group="munge", stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
