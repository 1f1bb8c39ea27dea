"""What network faults do to a run on several hosts: outcome, time to detect, and time until the next run trains.

    python -m benchmarks.faults_network --out benchmarks/results/faults_network.json

Hosts are network namespaces of this machine (benchmarks/hosts.py; needs root). Each host has one process, started by
torchrun with a static rendezvous, or with the variables alone, as a scheduler does it (`srun`).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts, can_make_hosts
from benchmarks.machine import describe_machine

LIMIT_S = 5
LONGEST_S = 240
RUN = (
    "data=synthetic",
    "model.n_layers=2",
    "model.hidden_size=32",
    "model.n_heads=2",
    "model.n_kv_heads=null",
    "model.head_dim=null",
    "model.ffn_size=64",
    "model.vocab_size=260",
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=1",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "train.precision=fp32",
    "train.steps=100000",
    "schedule.warmup_steps=2",
    "checkpoint.every=20",
    "checkpoint.keep=2",
    "parallel.dp_shard=-1",
    "log.wandb=off",
    "log.display=off",
    f"resilience.timeout_s={LIMIT_S}",
)


@dataclass
class Job:
    """One run on all hosts."""

    hosts: Hosts
    folder: Path
    launcher: str
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, host: str, *words: str, **env: str) -> None:
        """Start the process of a host; `words` are added to the command line."""
        place, count = self.hosts.names.index(host), len(self.hosts.names)
        first = self.hosts.address(self.hosts.names[0])
        job = ["-m", "megatrain", "train", *RUN, *words]
        variables = {}
        if self.launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", f"--nnodes={count}", "--nproc-per-node=1"]
            torchrun += [f"--node-rank={place}", f"--master-addr={first}", f"--master-port={self.port}"]
            command = [sys.executable, *torchrun, *job]
        else:
            command = [sys.executable, *job]
            variables = {
                "RANK": str(place),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
            }
            variables |= {"MASTER_ADDR": first, "MASTER_PORT": str(self.port)}
        every = (
            {"OMP_NUM_THREADS": "1", "MEGATRAIN_CACHE": str(self.folder / f"cache-{host}")} | variables | env
        )
        with self.output(host).open("ab") as output:
            started = self.hosts.start(host, command, cwd=self.folder, env=os.environ | every, output=output)
        self.processes[host] = started

    def output(self, host: str) -> Path:
        """Return the file that holds what a host prints."""
        return self.folder / f"{host}.log"

    def rows(self) -> int:
        """Return the number of steps recorded."""
        path = self.folder / "runs/default/metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until(self, condition: Callable[[], bool], seconds: float = LONGEST_S) -> float:
        """Wait for `condition`; return the seconds that took.

        Raises:
            TimeoutError: it took longer than `seconds`.
        """
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                logs = "\n".join(
                    f"--- {host}\n{self.output(host).read_text()[-3000:]}" for host in self.processes
                )
                raise TimeoutError(logs)
            time.sleep(0.05)
        return time.monotonic() - began

    def trains(self, rows: int = 3) -> float:
        """Wait until `rows` more steps are recorded."""
        before = self.rows()
        return self.until(lambda: self.rows() >= before + rows or self.ended(*self.processes))

    def trains_again(self) -> float:
        """Start on all hosts once more; return the seconds until the first new step."""
        path = self.folder / "runs/default/events.jsonl"

        def starts() -> int:
            return sum('"event": "start"' in line or '"event": "resume"' in line for line in path.open())

        before = starts()
        began = time.monotonic()
        for host in self.hosts.names:
            self.hosts.heal(host)
            self.start(host)
        self.until(lambda: starts() > before or self.ended(*self.processes))
        self.trains(1)
        return time.monotonic() - began

    def ended(self, *hosts: str) -> bool:
        """Return whether the processes of these hosts have ended."""
        return all(self.processes[host].poll() is not None for host in hosts)

    def status(self) -> dict[str, Any]:
        """Return the content of status.json."""
        path = self.folder / "runs/default/status.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found


@dataclass
class Outcome:
    """What a fault did."""

    fault: str
    launcher: str
    hosts: int
    outcome: str
    seconds_until_all_ended: float | None = None
    """From the fault until no process of the job runs on any host that still has power."""
    seconds_until_trains_again: float | None = None
    """From the next start of the same command to its first new step."""
    status: str = ""
    reason: str = ""
    said: str = ""
    """The last line of the first host's output, or of the second one's."""
    lines: int = 0
    """Lines that the first host printed."""


@contextlib.contextmanager
def job(launcher: str, count: int) -> Iterator[Job]:
    """Make hosts and a folder for a job."""
    with tempfile.TemporaryDirectory() as folder, Hosts(count) as hosts:
        yield Job(hosts, Path(folder), launcher, 29400)


def strike(
    name: str, launcher: str, count: int, fault: Callable[[Job], None], *, dead: tuple[str, ...] = ()
) -> Outcome:
    """Let a run be struck in mid-run, and start it again."""
    with job(launcher, count) as run:
        for host in run.hosts.names:
            run.start(host)
        run.trains()
        fault(run)
        struck = time.monotonic()
        alive = [host for host in run.hosts.names if host not in dead]
        run.until(lambda: run.ended(*alive))
        run.hosts.wait_until_empty(30)
        took = time.monotonic() - struck
        found = _outcome(run, name, "ends")
        found.seconds_until_all_ended = round(took, 1)
        found.seconds_until_trains_again = round(run.trains_again(), 1)
        if run.ended(*run.hosts.names):
            found.outcome += "; the next start fails"
        return found


def link_cut(launcher: str, count: int = 2) -> Outcome:
    """The link of the second host goes down."""
    return strike("link cut", launcher, count, lambda run: run.hosts.cut("h2"))


def link_cut_of_first(launcher: str) -> Outcome:
    """The link of the host of rank 0 goes down."""
    return strike("link of rank 0 cut", launcher, 2, lambda run: run.hosts.cut("h1"))


def host_killed(launcher: str, count: int = 2) -> Outcome:
    """The second host loses its power."""
    return strike("host killed", launcher, count, lambda run: run.hosts.kill("h2"), dead=("h2",))


def link_blinks(launcher: str) -> Outcome:
    """The link goes down for less than the limit."""
    with job(launcher, 2) as run:
        for host in run.hosts.names:
            run.start(host)
        run.trains()
        run.hosts.cut("h2")
        time.sleep(LIMIT_S / 2)
        run.hosts.heal("h2")
        run.trains(20)
        goes_on = not run.ended(*run.hosts.names)
        return _outcome(run, f"link cut for {LIMIT_S / 2} s", "trains on" if goes_on else "ends")


def link_slow(launcher: str) -> Outcome:
    """One host of four has a slow link from the start."""
    with job(launcher, 4) as run:
        run.hosts.slow_down("h3", "8mbit")
        for host in run.hosts.names:
            run.start(host, "resilience.timeout_s=60")
        run.until(lambda: run.ended(*run.hosts.names) or run.rows() > 3)
        refused = run.ended(*run.hosts.names)
        return _outcome(
            run, "link of h3 at 8 Mbit/s", "refused before the first step" if refused else "trains"
        )


def late_host(launcher: str) -> Outcome:
    """The second host comes ten seconds later."""
    with job(launcher, 2) as run:
        run.start("h1", "resilience.timeout_s=60")
        if launcher == "variables":
            run.until(lambda: "have not come" in run.output("h1").read_text())
        else:
            time.sleep(10)
        said = run.output("h1").read_text()
        run.start("h2", "resilience.timeout_s=60")
        run.trains()
        goes_on = not run.ended(*run.hosts.names)
        found = _outcome(run, "second host 10 s late", "trains" if goes_on else "ends")
        found.said = next(
            (line for line in said.splitlines() if "megatrain" in line), "nothing (torchrun waits)"
        )
        return found


def missing_host(launcher: str) -> Outcome:
    """The second host never comes."""
    with job(launcher, 2) as run:
        run.start("h1")
        took = run.until(lambda: run.ended("h1"))
        found = _outcome(run, "second host never comes", "ends")
        found.seconds_until_all_ended = round(took, 1)
        return found


def clock_off(launcher: str) -> Outcome:
    """The clock of the second host is a minute behind, for Python."""
    with job(launcher, 2) as run:
        code = "import time\nreal = time.time\ntime.time = lambda: real() - 60\n"
        (run.folder / "skew").mkdir()
        (run.folder / "skew" / "sitecustomize.py").write_text(code)
        run.start("h1")
        run.start("h2", PYTHONPATH=str(run.folder / "skew"))
        run.trains()
        events = (run.folder / "runs/default/events.jsonl").read_text()
        found = _outcome(
            run, "clock of h2 60 s behind", "trains, with a notice" if "clock of h2" in events else "trains"
        )
        notices = [json.loads(line) for line in events.splitlines() if '"notice"' in line]
        found.said = next((each["text"] for each in notices if "clock" in each["text"]), "")
        return found


def _outcome(run: Job, name: str, outcome: str) -> Outcome:
    status = run.status()
    lines = run.output("h1").read_text().splitlines()
    said = [
        line
        for host in run.processes
        for line in run.output(host).read_text().splitlines()
        if "megatrain: " in line
    ]
    return Outcome(
        name,
        run.launcher,
        len(run.hosts.names),
        outcome,
        status=str(status.get("state", "")),
        reason=str(status.get("reason", "")),
        said=said[-1] if said else "",
        lines=len(lines),
    )


CASES: list[Callable[[], Outcome]] = [
    *(lambda launcher=launcher: link_cut(launcher) for launcher in ("variables", "torchrun")),
    *(lambda launcher=launcher: link_cut_of_first(launcher) for launcher in ("variables", "torchrun")),
    *(lambda launcher=launcher: host_killed(launcher) for launcher in ("variables", "torchrun")),
    lambda: link_cut("variables", 4),
    lambda: host_killed("variables", 4),
    lambda: link_blinks("variables"),
    lambda: link_slow("variables"),
    *(lambda launcher=launcher: late_host(launcher) for launcher in ("variables", "torchrun")),
    lambda: missing_host("variables"),
    lambda: clock_off("variables"),
]


def main() -> None:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not can_make_hosts():
        sys.exit("Network namespaces can't be made here: they take root, and iproute2.")
    found = []
    for case in CASES:
        found.append(case())
        print(json.dumps(asdict(found[-1])), flush=True)
    result = {
        "command": f"python -m benchmarks.faults_network --out {options.out}",
        "machine": describe_machine(),
        "limit_s": LIMIT_S,
        "faults": [asdict(each) for each in found],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
