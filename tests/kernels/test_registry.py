"""The registry of operations and the folders they live in: a new one costs its folder and one line."""

import importlib
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import megatrain_kernels
from megatrain_kernels.kernel import KERNELS

PACKAGE = Path(str(megatrain_kernels.__file__)).parent
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
FILES = {"__init__.py", "reference.py", "triton.py", "op.py", "cases.py"}
MORE = ("torch.py", "triton_*.py")
"""In any folder: PyTorch's path where it is longer than a few lines, and parts of a Triton file that is too long."""
EXCEPTIONS = {"linear_xent": {"triton.py"}, "grouped_mm": {"permute.py"}}
"""The first runs the kernels of `xent`; the second also sorts tokens by expert."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_the_same_files(folder: str) -> None:
    files = {path.name for path in (PACKAGE / folder).glob("*.py")}
    found = {name for name in files if not any(fnmatch(name, pattern) for pattern in MORE)}
    assert found ^ FILES == EXCEPTIONS.get(folder, set())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_is_hidden_by_a_function(folder: str) -> None:
    """`import a.b.c as x` looks b up as an attribute of a."""
    assert not callable(getattr(megatrain_kernels, folder))
    for file in ("op", "reference", "cases"):
        names: dict[str, object] = {}
        exec(f"import megatrain_kernels.{folder}.{file} as module", names)
        assert names["module"] is importlib.import_module(f"megatrain_kernels.{folder}.{file}")


def test_every_operation_is_registered_once_and_exported() -> None:
    for name, kernel in KERNELS.items():
        assert getattr(megatrain_kernels, name) is kernel.function
        assert kernel.suite.cases
        assert kernel.suite.small
    folders = {kernel.function.__module__.split(".")[1] for kernel in KERNELS.values()}
    assert folders == set(FOLDERS)


ALONE = """
import sys

class Absent:
    names = {"triton", "hydra", "omegaconf", "pydantic", "yaml", "rich", "wandb", "safetensors", "pytest"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in Absent.names else find(name, package)
sys.path.insert(0, sys.argv[1])
from kernels_check import CALLS
for name, call in CALLS.items():
    for backend in ("auto", "reference"):
        assert call.run(backend), name
print(len(CALLS), any(name.partition(".")[0] == "triton" for name in sys.modules))
"""


def test_torch_and_numpy_alone_suffice() -> None:
    """Triton too may be absent: every operation runs on PyTorch's path and by its definition."""
    call = [sys.executable, "-c", ALONE, str(Path(__file__).parents[1])]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    count, has_triton = done.stdout.split()
    assert int(count) >= len(KERNELS)
    assert has_triton == "False"
