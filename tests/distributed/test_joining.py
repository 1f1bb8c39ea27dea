"""How processes find each other at an address: who is missing is said, and a taken port is one sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.runtime import joining

DOCTOR = [sys.executable, "-m", "megatrain", "doctor", "--cluster"]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    names = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    return os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            DOCTOR, env=environment(0, 2, port), cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatrain: Port {port} of this machine ({socket.gethostname()})")
    assert "choose another port" in done.stderr
    assert done.stderr.count("\n") == 1


def test_two_processes_are_compared(tmp_path: Path, port: int) -> None:
    team = [
        subprocess.Popen(
            DOCTOR,
            env=environment(rank, 2, port),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in team]
    assert [process.returncode for process in team] == [0, 0], said
    assert "The machines are alike and fit for a run." in said[0][0]
    assert "all ranks" in said[0][0]
    assert said[1][0] == ""


def test_who_does_not_come_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(0, 3, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(joining, "FIRST_WORD_S", 0.0)
    monkeypatch.setattr(joining, "PART_S", 0.2)
    with pytest.raises(
        joining.StalledError, match=r"2 of 3 processes have not come \(ranks 1, 2; here: .*the limit"
    ):
        joining.meet(0, 3, timeout_s=1.0)
    assert "megatrain: 2 of 3 processes have not come (ranks 1, 2; here: " in capfd.readouterr().err


def test_who_does_not_listen_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(1, 2, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(joining, "FIRST_WORD_S", 0.0)
    with pytest.raises(
        joining.StalledError, match=rf"waited for rank 0 at 127.0.0.1:{port} \(connection refused\)"
    ):
        joining.meet(1, 2, timeout_s=0.5)
    assert "has waited for rank 0" in capfd.readouterr().err
