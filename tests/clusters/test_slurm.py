"""The generated script on a real SLURM of two hosts: it trains, and survives what happens to jobs there.

The reference is the same run on this machine, which nothing disturbs: rows of metrics must be equal to the last bit.
"""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from real_hosts import LOGIN, Slurm, wait_until
from site_of_runs import TWO, Site, processes
from workplace import TINY, Workplace, command

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a busy machine
CPU = ("--gpus-per-node", "0", "--processes-per-node", "1")


class Jobs(Site):
    """A folder that the login node and both hosts see, and the command on the login node."""

    def __init__(self, slurm: Slurm, workplace: Workplace) -> None:
        super().__init__(workplace)
        self.slurm = slurm

    def prepare(self) -> None:
        """Have programs on all hosts use this folder's cache."""
        self.slurm.environment |= {"MEGATRAIN_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def launch(self, *words: str, name: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """`megatrain launch slurm` for a tiny run; returns when it does."""
        overrides = (f"data.path={self.workplace.text}", *TINY, f"run.name={name}")
        self.prepare()
        done = self.slurm.run(LOGIN, *command("launch", "slurm", *CPU, *overrides, *words), cwd=self.folder)
        assert done.returncode == expect, (
            f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done

    def submit(self, *words: str, name: str) -> str:
        """Submit a run of two nodes; return the job's id."""
        out = self.launch("--nodes", "2", "--detach", *TWO, *words, name=name).stdout
        return out.partition("job ")[2].partition(":")[0]

    def pause_at(self, name: str, step: int) -> None:
        """Wait for a step of the run, and stop it there."""
        try:
            wait_until(lambda: self.steps(name) > step, "training")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        self.pause(name)

    def ask_to_save(self, job: str) -> None:
        """Signal the paused run as SLURM does before the time limit, and let it go on."""
        self.slurm.say("scancel", "--signal=USR2", job)
        self.slurm.say("scancel", "--signal=CONT", job)

    def await_attempt(self, name: str, attempt: int) -> None:
        """Wait until an attempt trains."""
        wait_until(
            lambda: (
                self.steps(name) > 2
                and (self.status(name)["attempt"], self.status(name)["state"]) == (attempt, "running")
            ),
            f"attempt {attempt}",
        )

    def await_end(self, job: str, state: str = "COMPLETED") -> None:
        try:
            wait_until(lambda: self.slurm.state(job) == state, f"job {job} {state}")
        except AssertionError as error:
            facts = self.slurm.say("scontrol", "show", "job", job)
            raise AssertionError(f"{error}: it is {facts}\n{self.logs()}") from None


@pytest.fixture
def jobs(slurm: Slurm, workplace: Workplace) -> Iterator[Jobs]:
    found = Jobs(slurm, workplace)
    yield found
    slurm.say("scancel", "--user=root")
    slurm.say("scancel", "--user=root", "--signal=KILL", "--full")  # those that a failed test left stopped
    wait_until(lambda: slurm.say("squeue", "--noheader") == "", "an empty queue", 60)


def test_it_is_preempted_requeued_and_ends_as_the_unbroken_run(
    jobs: Jobs, unbroken: list[dict[str, object]]
) -> None:
    job = jobs.submit(name="mine")
    assert f"has a job already: {job} (" in jobs.launch("--nodes", "2", *TWO, name="mine", expect=2).stderr
    jobs.pause_at("mine", 12)
    other = jobs.slurm.say(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true"
    )
    jobs.await_end(other)
    jobs.await_end(job)
    assert jobs.slurm.restarts(job) == 1
    assert jobs.events("mine").count("resume") == 1
    assert jobs.status("mine")["state"] == "done"
    assert jobs.curve("mine") == unbroken


def test_a_mistake_is_refused_before_anything_is_queued(jobs: Jobs) -> None:
    mistakes = (
        (("--nodes", "2"), "2 nodes with 1 process each start 2, but the layout (every degree 1) needs 1"),
        (("--partition", "none-such"), "invalid partition"),
    )
    for words, says in mistakes:
        done = jobs.launch(*words, name="wrong", expect=2)
        assert says in done.stderr, done.stderr
    assert jobs.slurm.say("squeue", "--noheader", "--name=wrong") == ""
    assert not (jobs.folder / "runs").exists()


def test_tasks_of_srun_form_one_run(jobs: Jobs, unbroken: list[dict[str, object]]) -> None:
    """Without torchrun and without a script."""
    words = command("train", f"data.path={jobs.workplace.text}", *TINY, *TWO, "run.name=mine")
    jobs.prepare()
    done = jobs.slurm.run(LOGIN, "srun", "--nodes=2", "--ntasks=2", *words, cwd=jobs.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert jobs.curve("mine") == unbroken


@pytest.mark.slow
def test_the_script_without_torchrun_saves_at_a_signal_and_goes_on(
    jobs: Jobs, unbroken: list[dict[str, object]]
) -> None:
    job = jobs.submit("--tasks", "srun", name="mine")
    jobs.pause_at("mine", 12)
    jobs.ask_to_save(job)
    jobs.await_end(job)
    assert jobs.slurm.restarts(job) == 1
    assert jobs.curve("mine") == unbroken
    assert "stopped at step" in jobs.logs()


@pytest.mark.slow
def test_following_ends_with_the_runs_exit_code(jobs: Jobs) -> None:
    done = jobs.launch("--nodes", "2", *TWO, name="mine")
    assert "COMPLETED" in done.stdout
    assert "Finished: all 60 steps are done." in done.stdout
    assert "state: " not in done.stderr
    assert "run runs/mine: done" in jobs.launch("--status", name="mine").stdout
    refused = jobs.launch("--nodes", "2", *TWO, "data.path=/none", name="other", expect=2)
    assert "a restart does not mend this" in refused.stdout
    assert "/none" in refused.stdout


@pytest.mark.slow
def test_the_time_limit_comes(jobs: Jobs) -> None:
    job = jobs.submit("--time", "2", "--signal-s", "60", "train.steps=100000", name="mine")
    wait_until(lambda: jobs.slurm.restarts(job) == 1, "a restart")
    stopped = jobs.status("mine")
    assert (stopped["state"], stopped["reason"], stopped["exit_code"]) == ("stopped", "SIGUSR2", 75)
    jobs.await_attempt("mine", 2)
    assert f'"step": {stopped["step"]}' in jobs.last_event("mine", "resume")
    assert "Asked to save and end" in jobs.launch("--cancel", name="mine").stdout
    jobs.await_end(job)
    assert jobs.status("mine")["state"] == "stopped"
    assert jobs.slurm.restarts(job) == 1


@pytest.mark.slow
def test_scancel_in_a_save(jobs: Jobs, unbroken: list[dict[str, object]]) -> None:
    """Every step saves, so the signal comes in a save or beside one."""
    job = jobs.submit("checkpoint.every=1", name="mine")
    jobs.pause_at("mine", 20)
    jobs.slurm.say("scancel", job)
    jobs.await_end(job, "CANCELLED")
    assert jobs.status("mine")["state"] != "done"
    again = jobs.submit(name="mine")
    jobs.await_end(again)
    assert jobs.curve("mine") == unbroken
    assert jobs.slurm.restarts(job) == 0


@pytest.mark.slow
def test_an_unfit_node_is_left_out(jobs: Jobs, unbroken: list[dict[str, object]]) -> None:
    """The first one, which would otherwise be where the others meet."""
    odd = jobs.slurm.root / "odd-h1"
    odd.touch()
    try:
        job = jobs.submit("--partition", "wide", "--spare-nodes", "1", name="mine")
        jobs.await_end(job)
    finally:
        odd.unlink()
    assert "launch: left out h1; see " in jobs.logs()
    assert "PYTORCH_ODD: 1 on h1" in jobs.logs()
    assert jobs.curve("mine") == unbroken


@pytest.mark.slow
def test_a_node_is_set_down(jobs: Jobs, unbroken: list[dict[str, object]]) -> None:
    job = jobs.submit(name="mine")
    jobs.pause_at("mine", 12)
    jobs.slurm.say("scontrol", "update", "nodename=h2", "state=down", "reason=test")
    wait_until(lambda: jobs.slurm.state(job) == "PENDING", "the job is queued again")
    jobs.slurm.say("scontrol", "update", "nodename=h2", "state=resume")
    jobs.await_end(job)
    assert jobs.slurm.restarts(job) == 1
    assert jobs.curve("mine") == unbroken


@pytest.mark.slow
def test_a_run_that_fails_every_time_is_given_up(jobs: Jobs) -> None:
    """Before it has made a checkpoint."""
    job = jobs.submit("--max-restarts", "1", "train.steps=100000", "checkpoint.every=0", name="mine")
    for attempt in (1, 2):
        jobs.await_attempt("mine", attempt)
        for pid in processes("mine", ranks=True):
            os.kill(pid, signal.SIGKILL)
    jobs.await_end(job, "FAILED")
    assert jobs.slurm.restarts(job) == 1
    assert "gave up: " in jobs.logs()


@pytest.mark.slow
def test_a_sweep_is_an_array_of_jobs(jobs: Jobs) -> None:
    out = jobs.launch(
        "--nodes", "1", "-m", "train.seed=0,1", "optim.lr=1e-3,2e-3", "--array", "2", name="sweep"
    ).stdout
    job = out.partition("job ")[2].partition(":")[0]
    wait_until(lambda: set(jobs.slurm.state(f"{job}").split()) == {"COMPLETED"}, "the sweep")
    names = sorted(path.parent.name for path in (jobs.folder / "runs" / "sweep").glob("*/status.json"))
    assert names == [f"{n}-seed={n // 2},lr=0.00{1 + n % 2}" for n in range(4)]
    assert {jobs.status(f"sweep/{name}")["state"] for name in names} == {"done"}
    status = jobs.launch("--status", "-m", "train.seed=0,1", "optim.lr=1e-3,2e-3", name="sweep").stdout
    assert status.count("COMPLETED") == 4


@pytest.mark.slow
def test_a_chain_goes_on_where_the_job_before_ended(jobs: Jobs, unbroken: list[dict[str, object]]) -> None:
    ids = jobs.submit("--chain", "3", name="mine").split(", ")
    jobs.pause_at("mine", 12)
    jobs.ask_to_save(ids[0])
    for job in ids:
        jobs.await_end(job)
    assert jobs.curve("mine") == unbroken
    assert jobs.status("mine")["attempt"] == 2  # the third job found nothing left to do
    assert "Nothing is left to do" in jobs.logs()
