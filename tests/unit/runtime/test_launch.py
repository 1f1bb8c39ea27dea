"""How the processes of a layout end, when they run on this machine alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.runtime import launch

WAITS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print(flush=True); signal.pause()"


def child(program: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


@pytest.mark.parametrize("code", [launch.SAVED_BY_SIGNAL, 5])
def test_one_that_hears_nothing_is_killed_after_another_ended(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    deaf = child(WAITS)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    explain: Callable[[int], str] = "see the log of rank {}".format
    assert (
        launch.look_after([child(f"raise SystemExit({code})"), deaf], explain, tmp_path / "verdict") == code
    )
    assert deaf.returncode < 0
    assert ("process 0 of 2" in capsys.readouterr().err) == (code == 5)
