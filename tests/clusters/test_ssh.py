"""`launch ssh` and `launch torchrun` on two hosts with real sshds, each in a network namespace."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_hosts import HOSTS, LOGIN, Hosts, end, missing, wait_until
from site_of_runs import TWO, Site, processes
from workplace import TINY, Workplace, command

SSHD = """
Port 22
ListenAddress {address}
HostKey {root}/ssh/host
AuthorizedKeysFile {root}/ssh/client.pub
PidFile {root}/ssh/{host}.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
AcceptEnv MEGATRAIN_CACHE OMP_NUM_THREADS
"""
CLIENT = """
Host *
  IdentityFile {root}/ssh/client
  UserKnownHostsFile {root}/ssh/known
  StrictHostKeyChecking accept-new
  LogLevel ERROR
  SendEnv MEGATRAIN_CACHE OMP_NUM_THREADS
"""


@pytest.fixture(scope="module")
def sshds(hosts: Hosts) -> Iterator[Hosts]:
    """An sshd on each host, for a key made here."""
    if why := missing(["sshd", "ssh", "ssh-keygen", "setpriv"]):
        pytest.skip(f"{why}: apt-get install openssh-server")
    folder = hosts.root / "ssh"
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "config").write_text(CLIENT.format(root=hosts.root))
    daemons = []
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    for number, host in enumerate(HOSTS, 1):
        path = folder / f"{host}.conf"
        path.write_text(SSHD.format(root=hosts.root, host=host, address=f"10.77.0.{number}"))
        daemons.append(hosts.start(host, str(sshd), "-D", "-e", "-f", str(path), log=folder / f"{host}.log"))
    yield hosts
    for daemon in daemons:
        end(daemon)


class Launch:
    """`megatrain launch ssh` on the login host, for a tiny run on both hosts."""

    def __init__(self, hosts: Hosts, workplace: Workplace) -> None:
        self.hosts, self.site = hosts, Site(workplace)
        hosts.environment |= {"MEGATRAIN_CACHE": str(workplace.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def words(self, name: str, *more: str) -> list[str]:
        flags = [
            "--hosts",
            "h1,h2",
            "--gpus-per-node",
            "0",
            f"--ssh=-F{self.hosts.root}/ssh/config",
            "--grace-s",
            "60",
        ]
        data = f"data.path={self.site.workplace.text}"
        return command("launch", "ssh", *flags, data, *TINY, *TWO, f"run.name={name}", *more)

    def run(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(LOGIN, *self.words(name, *more), cwd=self.site.folder)

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.hosts.command(LOGIN, *self.words(name, *more)), cwd=self.site.folder,
            env=os.environ | self.hosts.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def launch(sshds: Hosts, workplace: Workplace) -> Launch:
    return Launch(sshds, workplace)


def test_two_hosts_train_as_one(launch: Launch, unbroken: list[dict[str, object]]) -> None:
    done = launch.run("mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert launch.site.curve("mine") == unbroken
    prefixes = {line.partition("]")[0] for line in done.stdout.splitlines()}
    assert prefixes == {"[h1", "[h2"}


@pytest.mark.slow
def test_all_end_when_the_processes_of_one_host_die(launch: Launch) -> None:
    process = launch.start("mine", "train.steps=100000", "schedule.warmup_steps=2")
    wait_until(lambda: launch.site.steps("mine") > 5, "training")
    os.kill(processes("mine", ranks=True)[-1], signal.SIGKILL)
    out, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, 2), out
    assert "ended with exit code 1" in out
    assert processes("mine") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_saves_and_ends_with_its_launcher(launch: Launch, number: signal.Signals) -> None:
    """Even when the launcher is killed: its connections are."""
    process = launch.start("mine", "train.steps=100000", "schedule.warmup_steps=2")
    wait_until(lambda: launch.site.steps("mine") > 5, "training")
    os.kill(process.pid, number)  # nsenter and unshare have become the launcher
    process.communicate(timeout=100)
    wait_until(lambda: not processes("mine"), "all processes ended", 60)
    assert launch.site.status("mine")["exit_code"] == 75
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)


@pytest.mark.slow
def test_a_host_that_cannot_be_reached_ends_the_others(launch: Launch) -> None:
    done = launch.run("mine", "--hosts", "h1,login")
    assert done.returncode == 255, done.stdout
    assert "[login]" in done.stdout
    assert "Connection refused" in done.stdout
    assert processes("mine") == []


@pytest.mark.slow
def test_torchrun_on_each_host(hosts: Hosts, workplace: Workplace, unbroken: list[dict[str, object]]) -> None:
    site = Site(workplace)
    hosts.environment |= {"MEGATRAIN_CACHE": str(workplace.folder / "cache"), "OMP_NUM_THREADS": "1"}
    flags = ["--nodes", "2", "--gpus-per-node", "0", "--master-addr", "h1"]
    words = command("launch", "torchrun", *flags, f"data.path={workplace.text}", *TINY, *TWO, "run.name=mine")
    other = subprocess.Popen(
        hosts.command("h2", *words, "--node-rank", "1"), cwd=site.folder, env=os.environ | hosts.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first = hosts.run("h1", *words, "--node-rank", "0", cwd=site.folder)
    assert (first.returncode, other.wait(60)) == (0, 0), first.stdout + first.stderr
    assert site.curve("mine") == unbroken
