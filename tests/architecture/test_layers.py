"""Who may import whom, checked by import-linter and by really importing."""

import keyword
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.cli.verbs import VERBS

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_import_linter_passes() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    call = [str(program), "--no-cache"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_import_linter_sees_every_layer() -> None:
    """A package that is in no layer would escape the rule."""
    listed = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    packages = {path.parent.name for path in (ROOT / "megatrain").glob("*/__init__.py")}
    assert packages == {name for name in packages if f"megatrain.{name}" in listed}


@pytest.mark.parametrize(
    "module", ["megatrain.train.config", "megatrain.config.load", "megatrain.config.text"]
)
def test_configs_load_without_heavy_packages(module: str) -> None:
    heavy = ("torch", "hydra", "omegaconf", "pydantic", "numpy", "yaml", "rich", "wandb")
    assert python(f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_answers_help(verb: str) -> None:
    call = [sys.executable, "-m", "megatrain", verb, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: megatrain {verb} ")


def module(verb: str) -> str:
    """Return the name of the verb's module: `import` is no name in Python."""
    return verb + "_" * keyword.iskeyword(verb)


def test_every_verb_is_a_file_with_run() -> None:
    for verb in VERBS:
        assert (
            "\ndef run(argv: list[str]) -> int:"
            in (ROOT / "megatrain" / "cli" / f"{module(verb.name)}.py").read_text()
        )
