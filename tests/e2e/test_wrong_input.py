"""Whatever is wrong with the input: exit code 2, one clear message, no traceback, nothing left behind."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workplace import TINY, Workplace, command

from megatrain.cli.main import main


def text_file(folder: Path, content: bytes, name: str = "wrong.txt") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def empty_directory(folder: Path) -> str:
    (folder / "nothing").mkdir()
    (folder / "nothing" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    return str(folder / "nothing")


DATA: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing file": (lambda folder: str(folder / "absent.txt"), "absent.txt"),
    "empty file": (lambda folder: text_file(folder, b""), "wrong.txt"),
    "one-token file": (lambda folder: text_file(folder, b"a"), "token"),
    "not UTF-8": (lambda folder: text_file(folder, b"fine so far \xff\xfe\xfa"), "UTF-8"),
    "directory without text": (empty_directory, "nothing"),
    "JSONL without the field": (
        lambda folder: text_file(folder, b'{"text": "a"}\n{"body": "b"}\n', "x.jsonl"),
        "x.jsonl",
    ),
    "broken JSONL": (lambda folder: text_file(folder, b'{"text": "a"}\n{"text": \n', "x.jsonl"), "x.jsonl"),
    "longer than the data": (lambda folder: text_file(folder, b"twenty bytes of text"), "seq_len"),
}

OVERRIDES = {
    "n_heads does not divide": (["model.n_heads=5"], ["model.n_heads=5", "hidden_size (32)", "4"]),
    "unknown key": (["train.stepz=3"], ["train.stepz", "train.steps"]),
    "unknown option": (["model=llama9"], ["llama9", "llama3"]),
    "several at once": (
        ["train.stepz=3", "model.n_heads=5", "optim.lr=fast"],
        ["stepz", "n_heads", "optim.lr"],
    ),
    "wrong type": (["train.steps=many"], ["train.steps", "integer"]),
    "a layout that the model does not fit": (
        ["parallel.tp=3"],
        ["parallel.tp=3", "must be at most model.n_heads"],
    ),
}


def assert_refused(workplace: Workplace, done: subprocess.CompletedProcess[str], words: list[str]) -> None:
    message = done.stderr
    assert "Traceback" not in message
    for word in words:
        assert word in message, message
    assert not (workplace.folder / "runs").exists()


@pytest.mark.parametrize("case", DATA)
def test_wrong_data(workplace: Workplace, case: str) -> None:
    make, word = DATA[case]
    path = make(workplace.folder)
    done = workplace.run(command("train", f"data.path={path}", *TINY), expect=2)
    assert_refused(workplace, done, [word])
    leftovers = [path for path in (workplace.folder / "cache").rglob("*") if ".tmp" in path.name]
    assert not leftovers


@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_overrides(workplace: Workplace, case: str) -> None:
    overrides, words = OVERRIDES[case]
    assert_refused(workplace, workplace.run(workplace.tiny(*overrides), expect=2), words)


@pytest.fixture
def small_disk(workplace: Workplace) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; needs the right to mount."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        target = workplace.folder / "disk"
        target.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)], check=False)
        if done.returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "run.dir={long}", "train.stepz=1"],
        ["train", "run.name={long}"],
        ["generate", "{long}"],
        ["report", "{long}"],
        ["export", "{long}", "out"],
        ["import", "{long}", "run.name=x"],
        ["bench", "--trace", "{long}"],
    ],
    ids=lambda words: words[0],
)
def test_a_name_too_long_for_a_file_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(long="x" * 300) for word in words]) == 2
    said = capsys.readouterr().err
    assert "x" * 300 in said
    assert ("255 bytes" if words[0] == "train" else "too long") in said
    assert ("stepz" in said) == (len(words) == 3 and words[0] == "train")


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
@pytest.mark.parametrize("options", ["ro", "size=64k"], ids=["read-only", "full"])
def test_a_run_directory_that_cannot_hold_the_run(
    workplace: Workplace, small_disk: Callable[[str], Path], options: str
) -> None:
    disk = small_disk(options)
    done = workplace.run(workplace.tiny(f"run.dir={disk}"), expect=2)
    assert_refused(workplace, done, [str(disk)])
    assert not os.listdir(disk)
