"""`megatrain checkpoint`: every action as it is typed, its output, its JSON, its exit code, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from unit.checkpoint.samples import all_bits, make_tensors
from unit.checkpoint.test_checkpoint_damage import cut_one_byte, flip_a_bit
from unit.checkpoint.test_checkpoint_inspect import content

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.checkpoint.store import Checkpointer
from megatrain.cli.completion import candidates
from megatrain.cli.main import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with steps 1 and 2, which part at step 2 in one tensor; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("a", "b"):
        checkpointer = Checkpointer(folder / name / "checkpoints", CheckpointConfig(keep=0))
        for step in (1, 2):
            tensors = make_tensors(step)
            if (name, step) == ("b", 2):
                tensors["model.double"][3] += 1.0
            info = {"layout": {"dp_shard": 2, "tp": 1}, "data_fingerprint": "f" * 64, "run_id": "\x1b[31mred"}
            checkpointer.save(step, tensors, {"step": step, "tokens": 5}, info)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of those runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run one action; return its exit code, output and messages."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["checkpoint", *words])
        return code, *capsys.readouterr()

    return run


def test_ls(folder: Path, call: Call) -> None:
    cut_one_byte(folder / "a" / "checkpoints" / "step-00000001" / "state.json")
    code, out, _ = call("ls", "a")
    assert code == 0
    title, first, second, total = out.splitlines()
    assert title.split() == ["step", "state", "size", "saved", "(UTC)", "layout", "after"]
    assert first.split()[:2] == ["1", "damaged"]
    assert "state.json has" in first
    assert second.split()[:2] == ["2", "complete"]
    assert second.endswith("dp_shard=2  step-00000001")
    assert total.startswith("1 damaged, 1 complete; ")
    rows = json.loads(call("ls", "a", "--json")[1])
    assert [(row["step"], row["state"]) for row in rows] == [(1, "damaged"), (2, "complete")]
    assert rows[1]["info"]["run_id"] == "\x1b[31mred"


def test_ls_does_not_wait_for_torch(folder: Path) -> None:
    code = (
        "import sys; from megatrain.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code, "checkpoint", "ls", "a"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_show(folder: Path, call: Call) -> None:
    code, out, _ = call("show", "a")
    assert code == 0
    assert "\x1b" not in out  # what a file says can't colour the terminal
    assert "run id            \\x1b[31mred" in out
    assert "model.layers.0.w     float32   64 × 96  24.6 kB" in out
    facts = json.loads(call("show", "a/checkpoints/step-00000001", "--json")[1])
    tensors = make_tensors(1)
    assert facts["step"] == 1
    assert {t["name"]: (t["dtype"], tuple(t["shape"]), t["bytes"]) for t in facts["tensors"]} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for name, t in tensors.items()
    }
    for kind, prefix in (("weights", "model."), ("optimizer", "optim.")):
        of_kind = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
        assert facts["totals"][kind] == {
            "tensors": len(of_kind),
            "elements": sum(tensor.numel() for tensor in of_kind),
            "bytes": sum(tensor.nbytes for tensor in of_kind),
        }


def test_verify(folder: Path, call: Call) -> None:
    code, out, err = call("verify", "a", "b/checkpoints/step-00000002")
    assert code == 0
    assert out.count(": whole, ") == 3
    assert "hashing step-00000002" in err
    flip_a_bit(folder / "a" / "checkpoints" / "step-00000001" / "__0_0_0.distcp")
    before = content(folder)
    code, out, _ = call("verify", "a")
    assert code == 3
    assert "a/checkpoints/step-00000001: damaged\n  __0_0_0.distcp was changed: its hash is wrong\n" in out
    assert "a/checkpoints/step-00000002: whole" in out
    code, out, _ = call("verify", "a", "--json")
    assert (code, [row["state"] for row in json.loads(out)]) == (3, ["damaged", "whole"])
    assert content(folder) == before


def test_diff(folder: Path, call: Call) -> None:
    code, out, _ = call("diff", "a/checkpoints/step-00000001", "b/checkpoints/step-00000001")
    assert code == 0
    assert f"Equal: {len(make_tensors(1))} tensors are bitwise equal" in out
    code, out, _ = call("diff", "a", "b")
    assert code == 1
    value = float(make_tensors(2)["model.double"][3])
    assert f"first    model.double: [3] is {value!r} and {value + 1!r}" in out
    found = json.loads(call("diff", "a", "b", "--json")[1])
    assert (found["equal"], found["first"], found["largest"]) == (False, "model.double", "model.double")
    assert found["differences"][0]["differing"] == 1
    assert call("diff", "a", "b", "--only", "optimizer")[0] == 0
    assert call("diff", "a", "b", "--rtol", "10")[0] == 0
    flip_a_bit(folder / "b" / "checkpoints" / "step-00000002" / "__0_1_0.distcp")
    code, _, err = call("diff", "a", "b")
    assert code == 3
    assert "step-00000002 is damaged: __0_1_0.distcp was changed" in err


def test_prune(folder: Path, call: Call) -> None:
    code, out, _ = call("prune", "a", "--keep", "1", "--dry-run")
    assert code == 0
    assert "step-00000001" in out
    assert "leave out --dry-run to do it" in out
    code, out, _ = call("prune", "a", "--keep", "1", "--json")
    assert [row["step"] for row in json.loads(out)["removals"]] == [1]
    assert os.listdir(folder / "a" / "checkpoints") == ["step-00000002"]
    assert call("prune", "a", "--keep", "1")[1] == f"There is nothing to remove in {Path('a/checkpoints')}.\n"


def test_copy_and_consolidate(folder: Path, call: Call) -> None:
    code, out, _ = call("copy", "a", "backup")
    assert code == 0
    assert out == "backup/step-00000002: a copy of a/checkpoints/step-00000002; every hash is right\n"
    assert call("verify", "backup")[0] == 0
    code, out, _ = call("consolidate", "backup", "one.safetensors", "--json")
    assert (code, json.loads(out)["files"]) == (0, 1)
    assert all_bits(load_file("one.safetensors")) == all_bits(make_tensors(2))
    code, out, _ = call("consolidate", "backup/step-00000002", "many", "--shard-gb", "0.00001")
    assert code == 0
    assert f"{len(make_tensors(2))} tensors of backup/step-00000002" in out
    assert len(list(Path("many").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say what to do. Actions: ls, show, verify, diff, prune, copy, consolidate"),
        (("verfy",), "there is no action 'verfy'. Did you mean verify?"),
        (("ls",), "the following arguments are required: run"),
        (("ls", "nowhere"), "nowhere: there is no such directory"),
        (
            ("ls", "."),
            "has no checkpoints: there is no checkpoints and no step-... in it. It holds runs: a, b.",
        ),
        (("show", "a/checkpoints/step-00000009"), "There are step-00000001, step-00000002"),
        (("prune", "a"), "the following arguments are required: --keep"),
        (("prune", "a", "--keep", "0"), "--keep 0: must be at least 1"),
        (("diff", "a", "b", "--rtol", "nan"), "--rtol nan: must be finite and at least 0"),
        (("diff", "a", "b", "--only", "loss"), "invalid choice: 'loss'"),
        (("consolidate", "a", "x", "--shard-gb", "0"), "--shard-gb 0.0: must be finite and above 0"),
        (("copy", "a", "a"), "nothing is overwritten"),
    ],
)
def test_mistakes(folder: Path, call: Call, words: tuple[str, ...], says: str) -> None:
    before = content(folder)
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert content(folder) == before


def test_completion_offers_the_actions() -> None:
    assert candidates("megatrain checkpoint co") == ["consolidate", "copy"]
    assert "--keep" in candidates("megatrain checkpoint prune a --")
