"""Jobs under SLURM: the batch script, its submission, and what has become of it.

The folder of a launch, `runs/NAME/launch/N/`, holds the script, the ids of its jobs and the messages of their nodes.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.launch.config import SlurmCluster
from megatrain.launch.record import RunStatus, read_status
from megatrain.launch.templates import new_folder, newest_folder, render

SCRIPT = "train.sbatch"
JOBS = "jobs"
ENDED = "ended"
"""Name of a file in the folder of a launch: why nothing more is to be started."""
EXIT = "exit"
"""Name of a file there: the exit code of a run that the user must mend."""
SITE = ("partition", "account", "qos", "reservation", "constraint", "exclude")
POLL_S = 1.0
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "GONE",
}  # fmt: skip
"""States from which a job does not come back by itself."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a launch."""

    directory: str
    """Its run directory."""
    overrides: tuple[str, ...]
    """Arguments of `megatrain train`."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What distinguishes the jobs of a launch from those of another one on the same cluster."""

    name: str
    is_chain: bool = False
    """Whether the next job of a chain goes on where this one ends."""
    at_once: int = 0
    """Jobs of a sweep that run at the same time; 0: all."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job as SLURM sees it."""

    id: str
    state: str
    reason: str
    """Why it waits, or where it runs."""

    @property
    def is_over(self) -> bool:
        """Whether SLURM does nothing more with it."""
        return self.state in OVER


def script(
    template: Path, cluster: SlurmCluster, runs: Sequence[Planned], folder: Path, options: JobOptions
) -> str:
    """Return the batch script.

    Args:
        template: `launchers/slurm/train.sbatch`.
        runs: one, or those of a sweep, which become an array.
        folder: where the launch keeps its files.
    """
    tasks = 1 if cluster.tasks == "torchrun" else cluster.processes
    here = os.getcwd()
    log = "job-%A_%a.log" if len(runs) > 1 else "job-%j.log"
    inside = [here, *(str(Path(run.directory).parent) for run in runs if Path(run.directory).is_absolute())]
    mounts = [each if ":" in each else f"{each}:{each}" for each in dict.fromkeys([*inside, *cluster.mounts])]
    values = {
        "cluster": cluster,
        "tasks": tasks,
        "inside": _entering(cluster, mounts),
        "jobs": runs,
        "folder": str(folder),
        "cpus_per_task": cluster.cpus_per_node // tasks,
        "output": _quoted(f"{str(folder).replace('%', '%%')}/{log}"),
        "chdir": _quoted(here),
        "site": [(name, getattr(cluster, name)) for name in SITE if getattr(cluster, name) is not None],
        "python": python(cluster.venv, cluster.container),
        "mounts": mounts,
        "name": options.name,
        "is_chain": options.is_chain,
        "at_once": options.at_once or len(runs),
    }
    return render(template, values)


def _entering(cluster: SlurmCluster, mounts: Sequence[str]) -> str:
    """Return the words before a command that is to run in the container, if srun does not see to that itself."""
    if cluster.container is None or cluster.container_kind != "apptainer":
        return ""
    binds = " ".join(f"--bind {shlex.quote(each)}" for each in mounts)
    gpu = "--nv " if cluster.gpus_per_node else ""
    return f'apptainer exec {gpu}{binds} --pwd "$PWD" {shlex.quote(cluster.container)} '


def python(venv: str | None, container: str | None) -> str:
    """Return the Python that runs the processes: that of the environment, of the container, or this one."""
    if container is not None:
        return "python"
    return sys.executable if venv is None else f"{venv}/bin/python"


def submit(directory: Path, write: Callable[[Path], str], chain: int = 1) -> tuple[Path, list[str]]:
    """Write the script of a launch and submit it; return the folder of the launch and the ids of its jobs.

    Args:
        directory: the run directory.
        write: returns the script for the folder of the launch.
        chain: number of jobs, each of which starts when the one before has ended.

    Raises:
        UserError: SLURM is not here, or refuses the job; nothing stays.
    """
    _require("sbatch")
    _require_no_job(directory)
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    folder = new_folder(directory)
    path = folder / SCRIPT
    path.write_text(write(folder))
    jobs: list[str] = []
    try:
        for _ in range(chain):
            after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            jobs.append(_slurm("sbatch", "--parsable", *after, str(path)).strip().partition(";")[0])
    except UserError:
        if jobs:
            _slurm("scancel", *jobs)
        shutil.rmtree(folder)
        _remove_empty(folder.parent, *made)
        raise
    (folder / JOBS).write_text("".join(f"{job}\n" for job in jobs))
    return folder, jobs


def status(directory: Path) -> tuple[list[Job], RunStatus | None]:
    """Return the jobs of the latest launch of a run, and the run's own record, if there is one."""
    return [found for job in _jobs(newest_folder(directory)) for found in query(job)], read_status(directory)


def cancel(directory: Path) -> list[str]:
    """End the jobs of the latest launch: a run saves first and is not started again. Return the ids of those jobs.

    Raises:
        UserError: there is no launch, or SLURM is not here.
    """
    folder = newest_folder(directory)
    jobs = [found for job in _jobs(folder) for found in query(job) if not found.is_over]
    for place in [folder, *(each for each in folder.iterdir() if each.is_dir())]:
        (place / ENDED).write_text("cancelled by megatrain launch slurm --cancel\n")
    waiting = [job.id for job in jobs if job.state in ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")]
    running = [job.id for job in jobs if job.id not in waiting]
    if waiting:
        _slurm("scancel", *waiting)
    for job in running:
        _slurm(
            "scancel", "--signal=TERM", job
        )  # to its processes, not to the script, which then sees the file
    return [job.id for job in jobs]


def query(job: str) -> list[Job]:
    """Return a job, or each job of an array, with its state."""
    try:
        found = _slurm(
            "squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i|%T|%R", "--states=all"
        )
    except UserError as error:  # SLURM forgets jobs some minutes after their end
        if "Invalid job id" not in str(error):
            raise
        found = ""
    rows = [line.split("|", 2) for line in found.splitlines() if line.count("|") >= 2]
    return [Job(name.strip(), state, reason) for name, state, reason in rows] or [Job(job, "GONE", "")]


def follow(directory: Path, folder: Path, jobs: Sequence[str], say: Callable[[str], None]) -> int:
    """Repeat what the jobs write until all are over; return the run's exit code.

    Args:
        say: takes in text, as it was written.
    """
    logs = _Logs(folder)
    said, was_over, is_over = "", False, False
    found: list[Job] = []
    while not (
        was_over and is_over
    ):  # twice in a row: a job that is queued again passes through such a state
        time.sleep(POLL_S)
        try:
            found = [job for each in jobs for job in query(each)]
            now = "; ".join(f"job {job.id}: {job.state} {job.reason}".rstrip() for job in found)
        except UserError as error:  # the controller may be away for a while
            now = str(error)
        if now != said:
            say(f"[{now}]\n")
            said = now
        say(logs.new())
        was_over, is_over = is_over, all(job.is_over for job in found)
    with contextlib.suppress(OSError, ValueError):  # there is one only if the user must mend something
        return int((folder / EXIT).read_text())
    record = read_status(directory)
    if (
        record is not None
        and record.state in ("done", "stopped")
        and all(job.state == "COMPLETED" for job in found)
    ):
        return 0
    return record.exit_code if record is not None and record.exit_code else 1


class _Logs:
    """What the files of a launch have gained since they were last looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, int] = {}

    def new(self) -> str:
        """Return the new text of the script's log and of the first node's; the other nodes repeat or wait."""
        parts = []
        for path in sorted([*self.folder.glob("job-*.log"), *self.folder.glob("*-0.log")]):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            self._read[path] = self._read.get(path, 0) + len(text)
            parts.append(text.decode(errors="replace"))
        return "".join(parts)


def _jobs(folder: Path) -> list[str]:
    try:
        return (folder / JOBS).read_text().split()
    except OSError:
        raise UserError(f"{folder} has no file '{JOBS}': it was not submitted by this command.") from None


def _require_no_job(directory: Path) -> None:
    """Refuse a second job for a run: it would wait, start, and find the run directory taken."""
    folders = (directory / "launch").glob("*/" + JOBS)
    active = [
        job for path in folders for each in _jobs(path.parent) for job in query(each) if not job.is_over
    ]
    if active:
        jobs = ", ".join(f"{job.id} ({job.state})" for job in active)
        raise UserError(
            f"{directory} has a job already: {jobs}. Wait for it, end it with --cancel, or choose another run.name."
        )


def _quoted(text: str) -> str:
    """Return a value of an `#SBATCH` line."""
    return f'"{text}"' if " " in text else text


def _remove_empty(*directories: Path) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:  # not empty
            return


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not on this machine. Submit on a login node of the cluster, or look at the script with "
            "--dry-run."
        )


def _slurm(*command: str) -> str:
    """Return what one of SLURM's commands prints.

    Raises:
        UserError: the command is not here, or failed; the message has its words.
    """
    _require(command[0])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} failed: {said}")
    return done.stdout
