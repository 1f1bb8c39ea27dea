"""Places of srun's tasks, from SLURM's variables."""

from pathlib import Path

import pytest

from megatrain.config.errors import StalledError, UserError
from megatrain.runtime import processes, slurm

TASK = {
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_JOB_ID": "12",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}  # fmt: skip


def test_a_tasks_place() -> None:
    assert slurm.task_variables(TASK) == {
        "RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20096",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("r[1-2]n[3,5]", "r1n3"),
        ("a-b[10]", "a-b10"),
    ],
)
def test_first_host(text: str, first: str) -> None:
    assert slurm.first_host(text) == first


def test_incomplete_variables_are_a_message() -> None:
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        slurm.task_variables({key: value for key, value in TASK.items() if key != "SLURM_LOCALID"})


def test_only_tasks_without_another_launcher_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    slurm.name_task()
    assert not processes.is_started()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    slurm.name_task()
    assert slurm.os.environ["WORLD_SIZE"] == "2"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    slurm.name_task()
    assert processes.is_started()
    assert [slurm.os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")] == [
        "6",
        "7",
        "10.0.0.1",
    ]


def test_fewer_processes_than_promised_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processes.PROMISED, "16")
    monkeypatch.setenv("WORLD_SIZE", "16")
    processes.require_promised_size()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"16 processes were promised .*, but 8 have come together"):
        processes.require_promised_size()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="but 1 has come together"):
        processes.require_promised_size()


@pytest.mark.parametrize(
    ("rank", "error", "left"),
    [
        ("0", UserError("x"), "2\n"),
        ("0", StalledError("x"), "1\n"),
        ("1", UserError("x"), ""),
        ("0", OSError("x"), ""),
    ],
)
def test_the_launcher_is_told_of_what_the_user_must_mend(
    rank: str, error: Exception, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "exit"
    monkeypatch.setenv(processes.EXIT_FILE, str(path))
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(type(error)), processes.telling_launcher():
        raise error
    assert (path.read_text() if path.exists() else "") == left
