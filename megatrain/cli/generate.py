"""`megatrain generate`: generate text with the model of a run."""

import argparse
import sys

from megatrain.cli.actions import run_here
from megatrain.config.errors import UserError
from megatrain.config.ranges import Range

NUMBERS = {
    "temperature": Range(at_least=0),
    "tokens": Range(at_least=0),
    "top_k": Range(at_least=1),
    "seed": Range(at_least=0),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"generate: {message}. See `megatrain generate --help`.")


def run(argv: list[str]) -> int:
    """Print the prompt and its continuation as it is generated; return the exit code."""
    parser = _Parser(prog="megatrain generate", add_help=False)
    parser.add_argument("run")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--average", action=argparse.BooleanOptionalAction)
    options = parser.parse_args(argv)
    for name, allowed in NUMBERS.items():
        value = getattr(options, name)
        if value is not None and (rule := allowed.broken_rule(value)):
            raise UserError(f"generate: --{name.replace('_', '-')} {value}: {rule}")
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):
        raise UserError("generate: the prompt is not UTF-8")
    from megatrain.runtime.device import (
        pick_device,
    )  # these import torch, so only once the command line is valid
    from megatrain.train.restore import restore_model
    from megatrain.train.sample import continue_text

    model, tokenizer, cfg, step = restore_model(run_here(options.run), pick_device(), average=options.average)
    print(f"{options.run}, step {step}, seed {options.seed}", file=sys.stderr)
    print(options.prompt, end="", flush=True)
    for piece in continue_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.tokens,
        context=cfg.seq_len,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    ):
        print(piece, end="", flush=True)
    print()
    return 0
