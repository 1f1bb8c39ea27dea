"""The page of the checkpoint format names what is written, and its script reads a checkpoint without MegaTrain."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from docs.test_commands import ROOT, blocks
from docs.test_run_record import TINY
from unit.checkpoint.samples import all_bits, make_tensors
from unit.checkpoint.test_checkpoint_damage import flip_a_bit

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.store import Checkpointer
from megatrain.cli.main import main

PAGE = ROOT / "docs" / "checkpoint-format.md"


def documented(title: str, section: str = "manifest.json") -> set[str]:
    """The first column of the table below `## section` whose first column has that title."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n")[1]
    table = text.split(f"| {title} |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))


def block(title: str, language: str) -> str:
    ((_, _, _, text),) = [each for each in blocks(language) if each[0] == PAGE and each[2] == title]
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoint that the page's command names, and the page's script."""
    checkpointer = Checkpointer(tmp_path / "runs" / "mine" / "checkpoints", CheckpointConfig())
    checkpointer.save(100, make_tensors(100), {"step": 100, "tokens": 1, "watch": {}}, {"seed": "ü"})
    (tmp_path / "read_checkpoint.py").write_text(block("read_checkpoint.py", "python"))
    return tmp_path


def run_as_documented(folder: Path) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(block("shell", "bash"))
    assert program == "python"
    # the environment has MegaTrain installed, so importing it is made to fail
    (folder / "megatrain.py").write_text("raise AssertionError('the script must not need MegaTrain')")
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_script_reads_every_tensor(folder: Path) -> None:
    done = run_as_documented(folder)
    assert done.returncode == 0, done.stderr
    tensors = make_tensors(100)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert done.stdout == f"step 100: {len(tensors)} tensors, {size} bytes\n"
    assert all_bits(torch.load(folder / "tensors.pt", weights_only=True)) == all_bits(tensors)


@pytest.mark.parametrize("name", ["__0_0_0.distcp", "manifest.json"])
def test_the_script_finds_damage(folder: Path, name: str) -> None:
    path = folder / "runs" / "mine" / "checkpoints" / "step-00000100" / name
    if name == "manifest.json":
        path.write_text(path.read_text().replace('"step": 100', '"step": 101'))
    else:
        flip_a_bit(path)
    done = run_as_documented(folder)
    assert (done.returncode, done.stderr) == (1, f"{name} was changed\n")
    assert not (folder / "tensors.pt").exists()


def test_the_page_names_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.txt").write_text("".join(f"Line {n}: {n * n}.\n" for n in range(400)))
    with chdir(tmp_path):
        assert main(["train", *TINY, "train.ema_decay=0.9", "train.stop_at=2"]) == 0
    path = max((tmp_path / "runs" / "default" / "checkpoints").iterdir())
    manifest = json.loads((path / "manifest.json").read_text())
    assert documented("field") == {*manifest, "encryption"} == {*(f.name for f in fields(Manifest)), "sha256"}
    assert documented("key of `info`") == manifest["info"].keys()
    state = json.loads((path / "state.json").read_text())
    assert documented("field", "state.json") == state.keys()
    named = {re.sub(r"^__\d+_\d+_\d+", "*", each.name) for each in path.iterdir()}
    assert named == {"*.distcp", ".metadata", "state.json", "manifest.json"}
