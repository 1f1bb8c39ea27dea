"""The command in the shells, containers and terminals that people have: right exit codes, no traceback, nothing lost.

Each case is a real process. `make test` runs those that are not marked slow, `make test-all` all of them.
"""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from workplace import TINY, Workplace, command, wait_for_rows

from megatrain.cli.main import main

STRANGER = (
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),  # it may read this interpreter
)
"""Start of a command line as a user without a name, as containers have."""
CAN_BECOME_STRANGER = os.geteuid() == 0 and shutil.which("setpriv") is not None


@dataclass(frozen=True)
class Shell:
    """One way to start the command."""

    redirect: str = ""
    """What a shell appends to the command line."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables that are set; None: unset."""
    as_stranger: bool = False


QUICK = {
    "all streams closed": Shell("<&- >&- 2>&-"),
    "ascii": Shell(environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": None}),
    "stranger without a home": Shell(environment={"HOME": None}, as_stranger=True),
}
SLOW = {
    "reader gone": Shell("| head -n 1"),
    "stdin closed": Shell("<&-"),
    "stdout closed": Shell(">&-"),
    "stderr closed": Shell("2>&-"),
    "disk of the output full": Shell(">/dev/full"),
    "everything full": Shell(">/dev/full 2>/dev/full"),
    "latin-1": Shell(environment={"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}),
    "no locale": Shell(environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "no home": Shell(environment={"HOME": None}),
    "home read-only": Shell(environment={"HOME": "/proc"}),
    "temporary directory missing": Shell(environment={"TMPDIR": "/nowhere"}),
    "colours forced": Shell(environment={"FORCE_COLOR": "1", "TERM": "dumb"}),
    "narrow": Shell(environment={"COLUMNS": "5", "NO_COLOR": "1"}),
}
TABLE = [
    *(pytest.param(shell, id=name) for name, shell in QUICK.items()),
    *(pytest.param(shell, id=name, marks=pytest.mark.slow) for name, shell in SLOW.items()),
]


def started(place: Workplace, shell: Shell, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in that shell; the exit code is the command's, not that of a pipe's end."""
    variables = place.environment | shell.environment
    if shell.as_stranger:
        for path in (place.folder, *place.folder.rglob("*")):
            os.chown(path, 54321, 54321)
        arguments = [*STRANGER, *arguments]
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell.redirect}; exit ${{PIPESTATUS[0]}}', "shell", *arguments],
        cwd=place.folder,
        env={key: value for key, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("shell", TABLE)
def test_train_ends_well(workplace: Workplace, shell: Shell) -> None:
    if shell.as_stranger and not CAN_BECOME_STRANGER:
        pytest.skip("only root can become another user, with setpriv")
    done = started(workplace, shell, workplace.tiny("train.steps=4"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    status = json.loads((workplace.folder / "runs" / "default" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 4, 0)
    assert [row["step"] for row in workplace.rows("default")] == [0, 1, 2, 3, 4]


OTHERS = {
    "help, reader gone": (["train", "--help", "--all"], Shell("| head -n 1"), (0, 141)),
    "help, closed": (["--help"], Shell(">&-"), (0,)),
    "help, disk full": (["--help"], Shell(">/dev/full"), (1,)),
    "config, disk full": (["train", "--cfg", "job"], Shell(">/dev/full"), (1,)),
    "mistake, stderr closed": (["train", "train.stepz=1"], Shell("2>&-"), (2,)),
    "no such run": (["generate", "~nobody-here/runs/x"], Shell(), (2,)),
    "a prompt that is not UTF-8": (["generate", "x", "\udcff"], Shell(), (2,)),
    "a temperature that is not finite": (["generate", "x", "--temperature", "nan"], Shell(), (2,)),
    "doctor, closed": (["doctor", "--json"], Shell(">&- 2>&-"), (0, 1)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_verbs_end_well(workplace: Workplace, case: str) -> None:
    words, shell, codes = OTHERS[case]
    done = started(workplace, shell, command(*words))
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if shell.redirect == "2>&-":
        assert done.stdout == ""  # what goes to one stream never ends up in the other


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export, for the verbs that take one."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "my.txt"
    text.write_text("".join(f"Line {n}: the square of {n} is {n * n}.\n" for n in range(100)))
    words = Workplace(folder, text).tiny("train.steps=4", "log.display=off", "data.tokenizer.kind=bpe")[3:]
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setenv("MEGATRAIN_CACHE", str(folder / "cache"))
        assert main(words) == 0
        assert main(["export", "runs/default", "exported"]) == 0
    return folder


BARE = {"HOME": None, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb", "NO_COLOR": "1"}
BENCH = ["bench", "--steps=1", "data=synthetic", *(word for word in TINY if not word.startswith("data."))]
VERIFY = ["verify", "--layouts=mine", "train.precision=fp64"]
RUNS, EXPORTED = "{made}/runs/default", "{made}/exported"
USES: dict[str, tuple[list[str], Shell, tuple[int, ...], str]] = {
    "export, closed": (["export", RUNS, "out"], Shell(">&-"), (0,), "out/model.safetensors"),
    "export, bare": (["export", RUNS, "ö"], Shell(environment=BARE), (0,), "ö/model.safetensors"),
    "import, reader gone": (
        ["import", EXPORTED, "run.name=it"],
        Shell("| true"),
        (0, 141),
        "runs/it/config.yaml",
    ),
    "report, closed": (["report", RUNS, "--out", "page.html"], Shell(">&- 2>&-"), (0,), "page.html"),
    "report, bare": (["report", RUNS, "--out", "ö.html"], Shell(environment=BARE), (0,), "ö.html"),
    "bench, reader gone": (BENCH, Shell("| true"), (0, 141), ""),
    "bench, bare": ([*BENCH, "--trace", "ö"], Shell(environment=BARE), (0,), "ö/trace-rank-0.json"),
    "verify, a fault that is none, bare": (["verify", "--fault", "ö"], Shell(environment=BARE), (2,), ""),
}
LONG_USES: dict[str, tuple[list[str], Shell, tuple[int, ...], str]] = {
    "export, reader gone": (["export", RUNS, "out"], Shell("| true"), (0, 141), "out/model.safetensors"),
    "export, disk full": (["export", RUNS, "out"], Shell(">/dev/full"), (0,), "out/model.safetensors"),
    "import, closed": (["import", EXPORTED, "run.name=it"], Shell(">&-"), (0,), "runs/it/config.yaml"),
    "import, bare": (
        ["import", EXPORTED, "run.name=it", "run.dir=ö"],
        Shell(environment=BARE),
        (0,),
        "ö/it/config.yaml",
    ),
    "report, reader gone": (["report", RUNS, "--out", "page.html"], Shell("| true"), (0, 141), "page.html"),
    "bench, closed": (BENCH, Shell(">&-"), (0,), ""),
    "bench, JSON, reader gone": ([*BENCH, "--json"], Shell("| true"), (141,), ""),
    "verify, reader gone": ([*VERIFY, "parallel.tp=2"], Shell("| true"), (141,), ""),
    "verify, closed": ([*VERIFY, "parallel.tp=2", "--json", "ö.json"], Shell(">&- 2>&-"), (0,), "ö.json"),
    "verify, bare": ([*VERIFY, "parallel.pp=2"], Shell(environment=BARE), (0,), ""),
}


@pytest.mark.parametrize("case", [*USES, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_USES)])
def test_verbs_that_take_a_run_or_a_config_end_well(workplace: Workplace, made: Path, case: str) -> None:
    words, shell, codes, written = (USES | LONG_USES)[case]
    done = started(workplace, shell, command(*(word.format(made=made) for word in words)))
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if written:
        assert (workplace.folder / written).stat().st_size > 0


def test_a_deleted_working_directory_is_named(workplace: Workplace) -> None:
    done = started(
        workplace,
        Shell(),
        ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "x", *command("train")],
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the working directory is gone" in done.stderr


def test_home_is_expanded_in_every_path(workplace: Workplace) -> None:
    """Quoted, so that the shell leaves it alone; a folder named `~` is never made."""
    (workplace.folder / "my.txt").rename(workplace.folder / "text.txt")
    shell = Shell(environment={"HOME": str(workplace.folder)})
    paths = ["data.path=~/text.txt", "run.dir=~/here", "data.cache_dir=~/kept"]
    done = started(workplace, shell, [*workplace.tiny("train.steps=4", "log.display=off"), *paths])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in workplace.folder.iterdir()) == ["cache", "here", "kept", "text.txt"]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, theirs
    os.close(ours)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("SIGHUP", ["parallel.dp_shard=2"]),
        *(
            pytest.param(name, [], marks=pytest.mark.slow)
            for name in ("SIGHUP", "SIGTERM", "SIGINT", "SIGUSR1")
        ),
        pytest.param("SIGTERM", ["parallel.tp=2"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_saves(workplace: Workplace, name: str, overrides: list[str]) -> None:
    """With several processes, each gets it twice: from the system and from the launcher."""
    process = subprocess.Popen(
        workplace.tiny("train.steps=100000", "checkpoint.every=0", "log.display=off", *overrides),
        cwd=workplace.folder, env=workplace.environment, start_new_session=True, text=True, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # where the tests run under nohup
    )  # fmt: skip
    try:
        assert wait_for_rows(process, workplace.folder / "runs" / "default" / "metrics.jsonl", 2)
        os.killpg(process.pid, signal.Signals[name])
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # or it would train on for hours
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, error
    status = json.loads((workplace.folder / "runs" / "default" / "status.json").read_text())
    assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", name, 75)
    saved = sorted((workplace.folder / "runs" / "default" / "checkpoints").iterdir())
    assert saved[-1].name == f"step-{status['step']:08d}"


def test_nohup_goes_on_when_the_terminal_closes(workplace: Workplace, terminal: tuple[int, int]) -> None:
    """SIGHUP that was ignored at the start stays ignored; and a live display survives a resize and a lost terminal."""
    ours, theirs = terminal
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "x", *workplace.tiny("train.steps=40", "train.eval_every=0")],
        cwd=workplace.folder, env=workplace.environment | {"TERM": "xterm"}, start_new_session=True, text=True,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    metrics = workplace.folder / "runs" / "default" / "metrics.jsonl"
    os.set_blocking(ours, False)
    assert wait_for_rows(process, metrics, 2)
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 10, 0, 0))
    os.killpg(process.pid, signal.SIGWINCH)
    os.killpg(process.pid, signal.SIGHUP)
    shown = b""
    while process.poll() is None:
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            wait_for_rows(process, metrics, metrics.read_bytes().count(b"\n") + 1)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=120) == 0, shown.decode(errors="replace")
    assert b"Traceback" not in shown
