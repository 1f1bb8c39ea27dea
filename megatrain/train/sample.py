"""Samples of text from a model: during a run, at its end, and by `megatrain generate`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from megatrain.data.tokenizer import Tokenizer
from megatrain.models.generate import generate
from megatrain.train.config import Config
from megatrain.train.run import Run

PYTHON_PROMPT = "def "
PROMPT_TOKENS = 8
TOKENS = 64
"""Most tokens of a sample during a run: they cost less than a validation."""
TEMPERATURE, TOP_K = 0.7, 50


def sample(run: Run) -> tuple[str, str] | None:
    """Return a prompt and its continuation by the model as it is now; None where there is none to be had.

    That is in a run without text, with `train.sample_tokens=0`, in fp8 (whose products want lengths that are multiples
    of 16) or of several processes, none of which has the full model.
    """
    cfg, state = run.cfg, run.state
    wanted = min(cfg.train.sample_tokens, TOKENS)
    if not wanted or cfg.data.kind != "text" or cfg.train.precision == "fp8" or run.processes.size > 1:
        return None
    prompt = prompt_of(run)
    eager = torch.compiler.set_stance("force_eager") if cfg.parallel.compile else contextlib.nullcontext()
    with eager:  # each length would be compiled anew
        pieces = sample_text(state.model, run.data.tokenizer, prompt, cfg, tokens=wanted)
        return prompt, "".join(pieces)


def prompt_of(run: Run) -> str:
    """Return what the samples of a run begin with: the first words held out, or Python's `def` where it reads that."""
    if run.cfg.data.path is None or not run.eval_batches:
        return PYTHON_PROMPT if run.cfg.data.path is None else ""
    first: list[int] = run.eval_batches[0].tokens[0, :PROMPT_TOKENS].tolist()
    end = run.data.tokenizer.eos_id
    return run.data.tokenizer.decode(first[: first.index(end)] if end in first else first)


def sample_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, cfg: Config, *, tokens: int
) -> Iterator[str]:
    """Yield a sample of a run, piece by piece: the same settings at all times, so that samples compare."""
    return continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=tokens,
        context=cfg.seq_len,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        seed=cfg.train.seed,
    )


def continue_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; an empty prompt starts a new document."""
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    produced: list[int] = []
    shown = ""
    for token in generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        context=context,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop=tokenizer.eos_id,
    ):
        produced.append(token)
        text = tokenizer.decode(produced)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # a character whose bytes are not complete yet
        yield text[len(shown) :]
        shown = text
