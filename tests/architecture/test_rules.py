"""Rules of form that hold for every file of both packages, read from the source; none needs an import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "megatrain").rglob("*.py"), *(ROOT / "kernels" / "megatrain_kernels").rglob("*.py")])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL_PARAMETERS = 6
"""Keyword-only ones are free: a call names them."""
OPTIONAL = {
    "accelerate",
    "cryptography",
    "opacus",
    "PIL",
    "deepspeed",
    "fsspec",
    "jinja2",
    "ftfy",
    "trafilatura",
    "py3langid",
    "rensa",
    "pyarrow",
    "pydantic",
    "rich",
    "tiktoken",
    "tokenizers",
    "transformers",
    "triton",
    "wandb",
    "yaml",
    "fcntl",
    "sklearn",
    "sacrebleu",
    "rouge_score",
    "lm_eval",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "torchao",
    "gguf",
}
"""Packages that may be absent, or that are slow to import and not always needed: imported where they are used."""
HEAVY = {"torch", "megatrain", "numpy"}
"""In the command, these too: it must answer mistakes, help and completion before PyTorch is imported."""
DISTRIBUTED = {"dtensor", "mesh", "rank", "ranks", "distributed", "devicemesh", "allreduce"}
"""Words that a layer or a model must not know (as parts of names, split at underscores and dots)."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def parameters(function: Function) -> list[ast.arg]:
    """Return all parameters but `self` and `cls`."""
    found = function.args
    extra = [each for each in (found.vararg, found.kwarg) if each is not None]
    every = [*found.posonlyargs, *found.args, *found.kwonlyargs, *extra]
    return [each for each in every if each.arg not in ("self", "cls")]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Every identifier and imported module of a file, with its line."""
    for node in ast.walk(tree(path)):
        line = getattr(node, "lineno", 0)
        for module in imported(node):
            yield line, module
        if isinstance(node, ast.ImportFrom):
            yield from ((line, alias.name) for alias in node.names)
        if isinstance(node, ast.Name | ast.Attribute | ast.arg | ast.keyword):
            name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node), "arg")
            yield line, getattr(node, name) or ""


def distributed_words(path: Path) -> list[str]:
    found = []
    for line, name in names(path):
        words = set(name.lower().replace("lora_rank", "").replace(".", "_").split("_"))  # that of a matrix
        if words & DISTRIBUTED:
            found.append(f"{path.name}:{line}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    if path.name == "__init__.py" and "megatrain_kernels" not in path.parts:
        assert text == ""
    elif text:
        assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short_and_annotated(path: Path) -> None:
    for function in functions(path):
        where = f"{relative(path)}:{function.lineno} {function.name}"
        assert (function.end_lineno or 0) - function.lineno < MAX_FUNCTION_LINES, (
            f"{where} is longer than a screen"
        )
        bare = [each.arg for each in parameters(function) if each.annotation is None]
        assert not bare, f"{where}: no annotation on {bare}"
        assert function.returns is not None, f"{where}: no annotation of what it returns"


@pytest.mark.parametrize(
    "path", [path for path in FILES if not relative(path).startswith("kernels/")], ids=relative
)
def test_functions_take_few_positional_parameters(path: Path) -> None:
    """Kernels are excepted: their signatures are those of the mathematics."""
    for function in functions(path):
        named = {each.arg for each in function.args.kwonlyargs}
        positional = [each for each in parameters(function) if each.arg not in named]
        where = f"{relative(path)}:{function.lineno} {function.name}"
        assert len(positional) <= MAX_POSITIONAL_PARAMETERS, f"{where} takes too many positional parameters"


def needs_optional(module: str) -> bool:
    """A module of ours that imports an optional package at its top, and so may be absent itself."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    tops = (
        [name.partition(".")[0] for node in tree(path).body for name in imported(node)]
        if path.is_file()
        else []
    )
    return not OPTIONAL.isdisjoint(tops)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_stand_at_the_top(path: Path) -> None:
    """But for optional packages, and in the command for what imports PyTorch."""
    allowed = OPTIONAL | (HEAVY if "cli" in path.parts else set())
    for function in functions(path):
        for node in ast.walk(function):
            for module in imported(node):
                top = module.partition(".")[0]
                legal = (
                    top in allowed or module.startswith("torch.utils.tensorboard") or needs_optional(module)
                )
                assert legal, f"{relative(path)}:{function.lineno} {function.name} imports {module}"


LAYERS = [*(ROOT / "megatrain" / "nn").rglob("*.py"), *(ROOT / "megatrain" / "models").rglob("*.py")]


def test_layers_and_models_are_found() -> None:
    found = {path.parent.name for path in LAYERS}
    assert {"nn", "models", "llama3", "gpt2"} <= found


@pytest.mark.parametrize("path", sorted(LAYERS), ids=relative)
def test_layers_and_models_know_nothing_of_parallelism(path: Path) -> None:
    assert distributed_words(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch.distributed.tensor import DTensor",
        "from torch import distributed",
        "def f(mesh: int) -> None: ...",
        "rank = 3",
        "x = y.device_mesh",
        "f(tp_rank=1)",
    ],
)
def test_that_rule_sees(line: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(line)
    assert distributed_words(path)


def test_that_rule_spares_other_words(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("import torch\nshuffled = ranked = torch.meshgrid\nq_lora_rank = 3\n")
    assert distributed_words(path) == []


PATCHES = re.compile(r"\.(forward|__class__|__call__) = |\._parameters\b")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_module_is_patched(path: Path) -> None:
    """Techniques replace declared seams or register hooks (`megatrain/nn/layer.py`)."""
    assert PATCHES.search(path.read_text(encoding="utf-8")) is None


def test_that_rule_sees_patches() -> None:
    for line in ("block.forward = f", "m.__class__ = C", "owner._parameters[leaf] = x"):
        assert PATCHES.search(line)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_importing_has_no_side_effect(path: Path) -> None:
    """No environment, device, file or terminal is touched by the statements of a module's top level."""
    forbidden = {
        "print",
        "open",
        "getenv",
        "parse_args",
        "is_available",
        "device_count",
        "mkdir",
        "manual_seed",
    }
    for statement in tree(path).body:
        if isinstance(statement, Function | ast.ClassDef) or is_main_guard(statement):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert called not in forbidden, f"{relative(path)}:{node.lineno} calls {called} when imported"
            if isinstance(node, ast.Attribute):
                assert node.attr != "environ", (
                    f"{relative(path)}:{node.lineno} reads the environment when imported"
                )


def is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
