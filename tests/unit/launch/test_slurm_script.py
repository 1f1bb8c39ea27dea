"""What the batch script decides when a job ends, run by bash with stand-ins for SLURM's commands."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatrain.launch.config import SlurmCluster
from megatrain.launch.slurm import JobOptions, Planned, script

TEMPLATE = Path(__file__).parents[3] / "launchers" / "slurm" / "train.sbatch"
STAND_INS = """
srun() {
  printf '%s\\n' "$@" > arguments
  printf '%s\\n' "$MASTER_ADDR $MEGATRAIN_EXPECT_WORLD" > environment
  . ./attempt
}
scontrol() { if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> requeued; fi; }
ip() { case "$*" in *route*) echo "10.0.0.2 dev ib0 src 10.0.0.1";; *) echo "3: ib0 inet 10.0.0.1/24 brd";; esac; }
getent() { echo "10.0.0.2 STREAM second"; }
"""
ENVIRONMENT = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "16",
    "PATH": "/usr/bin:/bin",
}


def text(cluster: SlurmCluster | None = None, **options: object) -> str:
    run = Planned("runs/mine", ("run.name=mine", "data.path=my text's.txt"))
    found = JobOptions(name="mine", **options)  # type: ignore[arg-type]
    return script(TEMPLATE, cluster or SlurmCluster(nodes=2), [run], Path("runs/mine/launch/1"), found)


def record(folder: Path, **facts: object) -> None:
    """Write the run's record as the run does."""
    (folder / "runs" / "mine").mkdir(parents=True, exist_ok=True)
    full = {
        "state": "stopped",
        "step": 5,
        "reason": 'a "quoted", reason',
        "exit_code": 75,
        "attempt": 1,
    } | facts
    (folder / "runs" / "mine" / "status.json").write_text(json.dumps(full, indent=1))


def attempt(folder: Path, saves: int = 0, **facts: object) -> None:
    """Make the next attempt leave this record, and a checkpoint of step `saves`."""
    lines = "return 1\n"
    if facts:
        other = folder / "next"
        record(other, **facts)
        lines = f"mkdir -p runs/mine/checkpoints; cp {other}/runs/mine/status.json runs/mine/\n{lines}"
    if saves:
        lines = f"mkdir -p runs/mine/checkpoints/step-{saves:08d}\n{lines}"
    (folder / "attempt").write_text(lines)


def run_script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    # "." of the stand-in returns from the file only; srun's result is that of the file
    return subprocess.run(
        ["bash", "-c", STAND_INS + body], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def requeues(folder: Path) -> int:
    path = folder / "requeued"
    return path.read_text().count("requeue 7\n") if path.exists() else 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_process_gets_its_orders(folder: Path) -> None:
    attempt(folder, saves=5, attempt=1)
    run_script(folder, text())
    words = (folder / "arguments").read_text().splitlines()
    assert words[-3:] == ["train", "run.name=mine", "data.path=my text's.txt"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--master-addr=10.0.0.1", "--max-restarts=0"} <= set(words)
    assert "--kill-on-bad-exit=0" in words
    assert (folder / "environment").read_text() == "10.0.0.1 16\n"


@pytest.mark.parametrize(
    ("facts", "code", "requeued", "says"),
    [
        ({"state": "stopped", "exit_code": 75}, 0, 1, "newest checkpoint"),
        ({"state": "failed", "exit_code": 1}, 0, 1, "newest checkpoint"),
        ({"state": "running", "exit_code": None}, 0, 1, "newest checkpoint"),
        ({"state": "done", "exit_code": 0}, 0, 0, "the run is done at step 5"),
        ({"state": "stopped", "exit_code": 0}, 0, 0, "the run is stopped at step 5"),
    ],
)
def test_the_runs_record_decides(
    folder: Path, facts: dict[str, object], code: int, requeued: int, says: str
) -> None:
    attempt(folder, saves=5, attempt=1, **facts)
    done = run_script(folder, text())
    assert (done.returncode, requeues(folder)) == (code, requeued), done.stdout + done.stderr
    assert says in done.stdout


@pytest.mark.parametrize("code", [2, 3])
def test_what_the_user_must_mend_is_not_tried_again(folder: Path, code: int) -> None:
    attempt(folder, attempt=1, state="failed", exit_code=code)
    lines = (folder / "attempt").read_text()
    (folder / "attempt").write_text(f'echo {code} > "$MEGATRAIN_EXIT_FILE"\n{lines}')
    done = run_script(folder, text())
    assert (done.returncode, requeues(folder)) == (code, 0)
    assert "a restart does not mend this" in done.stdout


def test_a_record_of_an_earlier_attempt_does_not_count(folder: Path) -> None:
    """Neither its end nor the exit code of the job before; that the run does not begin may be a node's fault."""
    record(folder, attempt=4, state="done", exit_code=0)
    (folder / "runs" / "mine" / "launch" / "1").mkdir(parents=True)
    (folder / "runs" / "mine" / "launch" / "1" / "exit").write_text("2\n")
    attempt(folder)
    done = run_script(folder, text())
    assert (done.returncode, requeues(folder)) == (0, 1)
    assert "did not begin" in done.stdout


def test_restarts_without_progress_are_bounded(folder: Path) -> None:
    script = text(SlurmCluster(nodes=2, max_restarts=2))
    codes = []
    for number in range(1, 6):
        attempt(folder, saves=5, attempt=number, state="failed", exit_code=1)
        codes.append(run_script(folder, script).returncode)
    assert (codes, requeues(folder)) == (
        [0, 0, 0, 1, 0],
        3,
    )  # the first made a checkpoint; the last started nothing
    assert "gave up" in (folder / "runs/mine/launch/1/ended").read_text()


def test_progress_gives_new_patience(folder: Path) -> None:
    script = text(SlurmCluster(nodes=2, max_restarts=1))
    for number in range(1, 7):
        attempt(folder, saves=number // 2 * 10 + 10, attempt=number, state="failed", exit_code=1)
        assert run_script(folder, script).returncode == 0
    assert requeues(folder) == 6


def test_a_signal_from_slurm_is_its_own_affair(folder: Path) -> None:
    attempt(folder, saves=5, attempt=1)
    (folder / "attempt").write_text("kill -TERM $$; " + (folder / "attempt").read_text())
    done = run_script(folder, text())
    assert (done.returncode, requeues(folder)) == (1, 0), done.stdout


def test_a_chain_goes_on_by_itself(folder: Path) -> None:
    attempt(folder, saves=5, attempt=1)
    done = run_script(folder, text(is_chain=True))
    assert (done.returncode, requeues(folder)) == (0, 0)


def test_forms_of_the_script() -> None:
    plain = text()
    assert "-m torch.distributed.run" in plain
    assert "--exclusive" in plain
    assert "nccl-trace" in plain
    srun = text(SlurmCluster(nodes=2, gpus_per_node=4, tasks="srun", cpus_per_node=32, partition="gpu"))
    assert "torch.distributed.run" not in srun
    assert {"#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=8", "#SBATCH --partition=gpu"} <= set(
        srun.splitlines()
    )
    pyxis = text(SlurmCluster(container="img", container_kind="pyxis", mounts=("/data",), env=("A=b c",)))
    assert "--container-image=img" in pyxis
    assert f"--container-mounts={os.getcwd()}:{os.getcwd()},/data:/data" in pyxis
    assert "export A='b c'" in pyxis
    assert "apptainer exec --nv --bind" in text(SlurmCluster(container="img"))
    modules = text(SlurmCluster(modules=("cuda/13",), venv="/opt/venv"))
    assert modules.startswith("#!/bin/bash -l\n")
    assert "module load cuda/13" in modules
    assert "/opt/venv/bin/python -m torch" in modules


def test_a_sweep_is_an_array() -> None:
    runs = [Planned(f"runs/lr/{n}", (f"optim.lr={n}", f"run.name='lr/{n}'")) for n in range(3)]
    found = script(TEMPLATE, SlurmCluster(), runs, Path("runs/lr/launch/1"), JobOptions(name="lr", at_once=2))
    assert "#SBATCH --array=0-2%2" in found
    assert re.search(r"^  1\) run=runs/lr/1; set -- optim.lr=1 ", found, re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=found, text=True, check=False).returncode == 0


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("tasks", ["torchrun", "srun"])
@pytest.mark.parametrize("container", [None, "img"])
def test_every_form_is_shell_without_loose_ends(nodes: int, tasks: str, container: str | None) -> None:
    found = text(SlurmCluster(nodes=nodes, tasks=tasks, container=container))  # type: ignore[arg-type]
    assert subprocess.run(["bash", "-n"], input=found, text=True, check=False).returncode == 0
    assert "{{" not in found
    assert "None" not in found
