"""`megatrain import`: import a model of another program as a run, to generate from, export or continue training."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.cli.options import Parser
from megatrain.config.errors import UserError
from megatrain.config.load import load
from megatrain.config.paths import expanded
from megatrain.runtime.packages import require_package
from megatrain.train.config import RunConfig

if TYPE_CHECKING:
    from megatrain.train.imported import Imported


def run(argv: list[str]) -> int:
    """Import, and compare logits if asked to; returns the exit code."""
    parser = Parser("import")
    parser.add_argument("directory")
    parser.add_argument("run", nargs="*", metavar="run.name=NAME run.dir=DIR")
    parser.add_argument("--like")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_intermixed_args(argv)
    named = _run_config(options.run)
    if options.check:
        require_package("transformers", "import --check")  # before anything is written
    from megatrain.observe.display import (
        make_display,
    )  # these import torch, so only once the command line is valid
    from megatrain.train.export_check import check_logits
    from megatrain.train.files import run_directory

    source = Path(expanded(options.directory))
    display = make_display("auto")
    try:
        done = _import(source, options.like, named, display.phase, check=options.check)
    finally:
        display.close()
    target = run_directory(done.cfg)
    print(
        f"{target}: {done.cfg.model.kind}, {done.parameters / 1e6:.1f}M parameters from {done.files} file(s)"
        + ", with the optimizer's moments" * done.has_moments
    )
    if options.check:
        difference = check_logits(target, source)
        print(f"largest difference of logits to transformers: {difference:.2e} of the largest logit")
    print(
        "Try next:\n"
        f'  megatrain generate {shlex.quote(str(target))} "Once"\n'
        f"  megatrain train {shlex.join(options.run)} data.path=FILE_OR_DIRECTORY train.steps=1000"
    )
    return 0


def _import(
    source: Path, like: str | None, run: RunConfig, progress: Callable[[str, float], None], *, check: bool
) -> "Imported":
    """Import what `source` is found to be: a checkpoint of Megatron-LM or DeepSpeed, or a Hugging Face directory."""
    from megatrain.train.import_hf import import_hf
    from megatrain.train.import_megatron import find_megatron, import_megatron
    from megatrain.train.import_universal import find_universal, import_universal

    for find, read, name in (
        (find_megatron, import_megatron, "Megatron-LM's distributed"),
        (find_universal, import_universal, "DeepSpeed's universal"),
    ):
        if (found := find(source)) is None:
            continue
        if like is None:
            raise UserError(
                f"import: {found} is a checkpoint in {name} format, which has neither a description of the model nor a "
                "tokenizer: add --like DIRECTORY with config.json and the tokenizer, as Hugging Face has them"
            )
        if check:
            raise UserError(
                "import: --check compares with the weights of a Hugging Face directory; here are none"
            )
        return read(found, Path(expanded(like)), run, progress=progress)
    if like is not None:
        raise UserError(
            f"import: --like is for checkpoints of Megatron-LM and DeepSpeed, but {source} is none: a distributed "
            "checkpoint has .metadata and common.pt, a universal one the folder zero/"
        )
    return import_hf(source, run, progress=progress)


def _run_config(words: list[str]) -> RunConfig:
    """Return the name and directory of the new run.

    Raises:
        UserError: the name is missing or illegal, or another key is given.
    """
    given = dict(word.partition("=")[::2] for word in words)
    if unknown := [key for key in given if key not in ("run.name", "run.dir")]:
        raise UserError(
            f"import: {', '.join(unknown)}: only run.name and run.dir are allowed here; the model is the imported one, "
            "and everything else is set in `megatrain train`"
        )
    if not given.get("run.name"):
        raise UserError("import: name the new run: megatrain import DIRECTORY run.name=NAME")
    return load(RunConfig, {key.removeprefix("run."): value for key, value in given.items()})
