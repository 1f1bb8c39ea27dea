"""`megatrain generate`: continue prompts with the model of a run, or of a Hugging Face directory."""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from megatrain.cli.actions import run_here, strict_json
from megatrain.cli.job import require_room
from megatrain.cli.options import Parser
from megatrain.cli.prompts import OF_A_PROMPT, check_numbers, rows_of
from megatrain.config.errors import UserError
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.runtime.launch import start_here
from megatrain.runtime.processes import Processes, is_started
from megatrain.runtime.slurm import name_task

if TYPE_CHECKING:
    from megatrain.train.generation import Continuation, TextRequest
    from megatrain.train.inference import TrainedModel


def run(argv: list[str]) -> int:
    """Print the prompts and their continuations, a single one as it is generated; return the exit code."""
    options = _parser().parse_intermixed_args(argv)
    check_numbers("generate", options)
    if options.logprobs is not None and not options.json:
        raise UserError("generate: --logprobs needs --json, which shows them")
    if options.draft is not None and options.lookup:
        raise UserError("generate: --draft and --lookup are two ways to guess tokens; choose one")
    rows = rows_of(options)
    return in_layout("generate", argv, options, partial(_generate, options, rows))


def _parser() -> Parser:
    parser = Parser("generate")
    parser.add_argument("run")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts", dest="file", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    for name in ("--top-p", "--min-p"):
        parser.add_argument(name, type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logprobs", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lookup", action="store_true")
    parser.add_argument("--draft", metavar="RUN")
    parser.add_argument("--draft-tokens", type=int, default=4)
    add_layout(parser)
    return parser


def add_layout(parser: Parser) -> None:
    """Add the flags that say which weights are loaded, and into how many processes."""
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--average", action=argparse.BooleanOptionalAction)


def in_layout(verb: str, argv: list[str], options: Namespace, job: Callable[[Processes], int]) -> int:
    """Run `job` in as many processes as `--tp`, `--pp` and `--dp` need; start them unless a launcher has."""
    layout = layout_of(options)
    size = world_size(layout)
    name_task()
    if is_started():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when it is imported
        from megatrain.runtime.group import joined

        with joined() as processes:
            return job(processes)
    if size == 1:
        return job(Processes())
    copies = f" --dp {layout.dp_replicate}" if layout.dp_replicate > 1 else ""
    require_room(f"--tp {layout.tp} --pp {layout.pp}{copies}", size)
    from megatrain.train.inference import config_for_inference

    # One process refuses sooner than all of them would.
    config_for_inference(run_here(options.run), layout, options.average)
    command = [sys.executable, "-m", "megatrain", verb, *argv]
    return start_here(command, size, explain=lambda process: "its message is above")


def layout_of(options: Namespace) -> ParallelConfig:
    """Return the layout that the flags of `add_layout`, and `--dp` where a verb has it, ask for."""
    return ParallelConfig(tp=options.tp, pp=options.pp, dp_replicate=getattr(options, "dp", 1), zero_stage=0)


def load_model(options: Namespace, processes: Processes) -> "TrainedModel":
    """Load the model that the flags of `add_layout` name."""
    from megatrain.train.inference import load_trained

    directory = processes.from_first(lambda: run_here(options.run))
    return load_trained(directory, processes, layout_of(options), average=options.average)


def _require_language_model(trained: "TrainedModel", run: str) -> None:
    if trained.parallel.plan.has_classifier:
        raise UserError(
            f"generate: {run} is a classifier, which predicts labels and no tokens: use megatrain evaluate --labels"
        )


def _generate(options: Namespace, rows: list[dict[str, Any]], processes: Processes) -> int:
    with processes.at_work():
        from megatrain.models.generate import Generation
        from megatrain.models.sampling import Sampling
        from megatrain.train.generation import TextRequest, continue_texts

    trained = load_model(options, processes)
    _require_language_model(trained, options.run)
    requests = [
        TextRequest(
            prompt=row["prompt"],
            tokens=row["tokens"],
            sampling=Sampling(**{name: row[name] for name in OF_A_PROMPT if name != "tokens"}),
            stop=row["stop"],
            logprobs=options.logprobs,
        )
        for row in rows
    ]
    engine = partial(
        Generation, drafter=_drafter(options, trained, requests), draft_tokens=options.draft_tokens
    )
    if processes.is_first:
        step = "" if trained.step is None else f", step {trained.step}"
        print(f"{options.run}{step}, seed {options.seed}", file=sys.stderr)
    growing = continue_texts(
        trained.packed(),
        trained.tokenizer,
        requests,
        context=trained.context,
        max_batch=options.batch,
        engine=engine,
    )
    streams = len(requests) == 1 and not options.json and processes.is_first
    if streams:
        print(requests[0].prompt, end="", flush=True)
    texts: dict[int, Continuation] = {}
    shown = 0
    for number, piece, text in growing:
        texts[number] = text
        if streams:
            print(piece, end="", flush=True)
        while not streams and not options.json and shown in texts and texts[shown].finish:
            if processes.is_first:
                print(f"[{shown + 1}] {requests[shown].prompt}{texts[shown].text}\n", flush=True)
            shown += 1
    if streams:
        print()
    if options.json and processes.is_first:
        found = {
            "run": options.run,
            "step": trained.step,
            "completions": [_facts(texts[n]) for n in sorted(texts)],
        }
        print(json.dumps(strict_json(found), indent=1, ensure_ascii=False))
    return 0


def _drafter(options: Namespace, trained: "TrainedModel", requests: "list[TextRequest]") -> Any:
    """Return what guesses tokens, if anything is to."""
    from megatrain.models.generate import blocks_needed
    from megatrain.models.speculate import DraftModel, LookUp
    from megatrain.train.inference import load_trained

    if options.lookup:
        return LookUp()
    if options.draft is None:
        return None
    # Each process has all of it: it is small.
    guesser = load_trained(run_here(options.draft), Processes(), device=trained.parallel.device)
    if guesser.tokenizer.digest() != trained.tokenizer.digest():
        raise UserError(f"generate: --draft {options.draft}: it has another tokenizer than {options.run}")
    sizes = [each.cfg.model.vocab_size for each in (guesser, trained)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"generate: --draft {options.draft}: model.vocab_size is {sizes[0]}, but {sizes[1]} in {options.run}"
        )
    for_model = [each.for_model(trained.tokenizer) for each in requests]
    n_blocks = blocks_needed(for_model, context=guesser.context, max_batch=options.batch)
    return DraftModel(guesser.packed(), context=guesser.context, n_blocks=n_blocks)


def _facts(text: "Continuation") -> dict[str, Any]:
    """Return what came of a prompt as plain data."""
    request, decode = text.request, text.tokenizer.decode
    facts: dict[str, Any] = {
        "prompt": request.prompt,
        "text": text.text,
        "finish": text.finish,
        "seed": request.sampling.seed,
        "tokens": text.tokens,
    }
    if request.logprobs is not None:
        facts["logprobs"] = [
            {
                "token": each.token,
                "text": decode([each.token]),
                "logprob": each.logprob,
                "top": [{"token": token, "text": decode([token]), "logprob": x} for token, x in each.top],
            }
            for each in text.produced
            if each.token is not None
        ]
    return facts
