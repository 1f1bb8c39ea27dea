"""`megatrain export`: a run's model as a directory that transformers loads."""

import argparse
import math
from pathlib import Path

from megatrain.cli.actions import run_here
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.runtime.packages import require_package


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"export: {message}. See `megatrain export --help`.")


def run(argv: list[str]) -> int:
    """Export, and compare logits if asked to; returns the exit code."""
    parser = _Parser(prog="megatrain export", add_help=False)
    parser.add_argument("run")
    parser.add_argument("directory")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--average", action=argparse.BooleanOptionalAction)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--encrypt", action="store_true")
    options = parser.parse_args(argv)
    if not 0 < options.shard_gb < math.inf:
        raise UserError("export: --shard-gb must be finite and above 0")
    if options.check and options.encrypt:
        raise UserError(
            "export: --check reads the exported weights, which --encrypt makes unreadable; leave out one"
        )
    if options.check:
        require_package("transformers", "export --check")  # before anything is written
    from megatrain.observe.display import (
        make_display,
    )  # these import torch, so only once the command line is valid
    from megatrain.train.export import export
    from megatrain.train.export_check import check_logits
    from megatrain.train.files import read_config

    source, target = run_here(options.run), Path(expanded(options.directory))
    _check_merge(read_config(source).lora.rank > 0, merge=options.merge, check=options.check)
    display = make_display("auto")
    try:
        done = export(
            source,
            target,
            dtype=options.dtype,
            average=options.average,
            shard_bytes=int(options.shard_gb * 1e9),
            progress=display.phase,
            merge=options.merge,
            encrypt=options.encrypt,
        )
    finally:
        display.close()
    print(f"{target}: step {done.step}, {done.parameters / 1e6:.1f}M parameters in {done.files} file(s)")
    if not any(target.glob("tokenizer*")):
        print("no tokenizer was written: Hugging Face's format has none for a tokenizer of bytes")
    if options.check:
        tolerance = 1e-3 if options.dtype == "fp32" else 0.1  # 16-bit weights round each logit
        difference = check_logits(source, target, tolerance=tolerance, average=options.average)
        print(f"largest difference of logits to transformers: {difference:.2e} of the largest logit")
    return 0


def _check_merge(has_adapters: bool, *, merge: bool, check: bool) -> None:
    """Refuse flags that do not fit a run with or without adapters.

    Raises:
        UserError: they don't.
    """
    if merge and not has_adapters:
        raise UserError(
            "export: --merge adds the adapters of a run (lora.rank) to its model; this one has none"
        )
    if check and has_adapters and not merge:
        raise UserError("export: --check compares whole models; add --merge, as this run trains adapters")
