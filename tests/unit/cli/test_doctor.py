"""`megatrain doctor` on this machine, and on broken ones."""

import json
import os
import platform
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatrain.cli import machine
from megatrain.cli.doctor import run


def rows(part: list[machine.Row]) -> dict[str, machine.Row]:
    return {row.name: row for row in part}


def test_json_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "ok",
        "versions",
        "cpu",
        "cuda",
        "memory",
        "compiler",
        "network",
        "paths",
        "features",
    }
    assert code == (0 if found["ok"] else 1)
    versions = {row["name"]: row["value"] for row in found["versions"]}
    assert versions["torch"] == torch.__version__
    assert versions["python"].startswith(platform.python_version())


def test_plain_text_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "versions\n  python " in out


def test_a_missing_feature_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FEATURES", (("no_such_package_x", "something"), ("json", "nothing")))
    found = rows(machine.features())
    assert found["no_such_package_x"] == machine.Row(
        "no_such_package_x",
        "not installed; needed for something",
        "missing",
        f"{sys.executable} -m pip install no_such_package_x",
    )
    assert found["json"].state == "ok"


def test_a_required_package_that_fails_to_import_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package_x.py").write_text("raise OSError('libx.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "REQUIRED", ("broken_package_x",))
    row = rows(machine.versions())["broken_package_x"]
    assert (row.state, row.value) == ("broken", "OSError: libx.so: cannot open")


def test_paths_are_tried_and_left_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache" / "deep"))
    assert {row.state for row in machine.paths()} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "file" / "cache"))
    row = rows(machine.paths())["data cache"]
    assert (row.state, row.fix) == (
        "broken",
        "set MEGATRAIN_CACHE or data.cache_dir to a writable directory",
    )


def test_the_compiler_is_really_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\ntest \"$1\" = --version && echo 'fake 1.0' && exit 0\necho 'no headers' >&2; exit 1\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(fake))
    assert rows(machine.compiler())["c++"].value == "fake 1.0: no headers"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    found = rows(machine.compiler())
    assert {found["c++"].state, found["ninja"].state} == {"missing"}


def test_network_knows_the_loopback_and_the_host_name() -> None:
    found = rows(machine.network())
    assert found["lo"].value == "127.0.0.1 (up)"
    assert found["host name"].value.startswith(socket.gethostname())


def test_an_unknown_host_name_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    row = rows(machine.network())["host name"]
    assert row.state == "missing"
    assert "/etc/hosts" in row.fix


def test_memory_and_cores_are_this_machines() -> None:
    assert (
        f"of {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f}"
        in rows(machine.memory())["memory"].value
    )
    assert rows(machine.cpu())["cores"].value == f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"


def test_it_runs_without_the_optional_packages(tmp_path: Path) -> None:
    """As on a machine with the required packages only: importing any other one fails (None in sys.modules)."""
    blocked = [name for name, _ in machine.FEATURES]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from megatrain.cli.main import main
sys.exit(main(['doctor']) or main(['train', '--cfg', 'job']) or main(['train', '--help', '--all']))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "not installed" in done.stdout
