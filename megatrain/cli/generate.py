"""`megatrain generate`: generate text with the model of a run."""

import argparse
import sys
from pathlib import Path

from megatrain.config.errors import UserError


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
    if options.temperature < 0 or options.tokens < 0 or (options.top_k is not None and options.top_k < 1):
        raise UserError("generate: --temperature and --tokens must be at least 0, and --top-k at least 1")
    from megatrain.runtime.device import (
        pick_device,
    )  # these import torch, so only once the command line is valid
    from megatrain.train.restore import restore_model
    from megatrain.train.sample import continue_text

    model, tokenizer, cfg, step = restore_model(Path(options.run), pick_device(), average=options.average)
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
