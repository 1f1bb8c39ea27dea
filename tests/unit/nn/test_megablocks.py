"""The adapter of MegaBlocks imports everywhere, and says all that it lacks. It never ran on a GPU here."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from megatrain.config.errors import UserError
from megatrain.nn.megablocks import check_megablocks

ROOT = Path(__file__).parents[3]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PACKAGES = "the packages megablocks and grouped_gemm, built for torch"


def fake_package(folder: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package megablocks, of which only the part that is imported exists, where Python finds it first."""
    (folder / "megablocks").mkdir()
    (folder / "megablocks" / "__init__.py").touch()
    (folder / "megablocks" / "grouped_gemm_util.py").write_text(content)
    monkeypatch.syspath_prepend(folder)
    for name in ("megablocks", "megablocks.grouped_gemm_util"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_all_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megablocks", None)
    monkeypatch.delitem(sys.modules, "megablocks.grouped_gemm_util", raising=False)
    with pytest.raises(UserError) as raised:
        check_megablocks(CPU, torch.float32)
    text = str(raised.value)
    assert text.startswith(
        "moe.backend=megablocks needs a GPU (the model is on cpu); train.precision=bf16 (it"
    )
    assert f"{PACKAGES} {torch.__version__} (ModuleNotFoundError: " in text
    assert text.endswith("Set moe.backend=auto, or make its environment as docs/engines.md says.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("def grouped_gemm_is_available(): return False", "grouped_gemm can't be imported"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12: cannot open"),
    ],
)
def test_an_installation_that_does_not_work_is_told_why(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, content, monkeypatch)
    with pytest.raises(UserError, match=re.escape(f"{PACKAGES} {torch.__version__} ({reason})")):
        check_megablocks(CUDA, torch.bfloat16)


def test_a_good_installation_needs_a_gpu_and_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "def grouped_gemm_is_available(): return True", monkeypatch)
    check_megablocks(CUDA, torch.bfloat16)
    with pytest.raises(UserError, match=r"needs a GPU \(the model is on cpu\)\. Set"):
        check_megablocks(CPU, torch.bfloat16)
    with pytest.raises(UserError, match=r"needs train.precision=bf16 \(it computes in float32\)\. Set"):
        check_megablocks(CUDA, torch.float32)


def test_no_extra_brings_it() -> None:
    """Its requirements exclude this project's torch and numpy: an extra with it could not be installed at all."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [word for words in extras.values() for word in words]
    assert not [word for word in named if re.match(r"(megablocks|grouped.gemm|stanford.stk)\b", word)]
    pinned = (ROOT / "constraints-megablocks.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in ("megablocks", "grouped_gemm", "stanford-stk"))
