"""Samples of text from a model during a run and at its end."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn

from megatrain.data.config import EXAMPLES, LABELLED
from megatrain.data.tokenizer import Tokenizer
from megatrain.models.sampling import Sampling
from megatrain.parallel.layout import FLOAT8_GROUP
from megatrain.parallel.packed_logits import PackedLogits
from megatrain.train.config import Config
from megatrain.train.generation import TextRequest, continue_texts
from megatrain.train.run import Run

PYTHON_PROMPT = "def "
PROMPT_TOKENS = 8
TOKENS = 64
"""Most tokens of a sample during a run: they cost less than a validation."""
FLOAT8_ROWS = 16
"""Products in fp8 want lengths that are multiples of this."""
LONGEST_S = 60.0
"""A sample ends after this time: each token gathers the weights of a sharded model once."""
TEMPERATURE, TOP_K = 0.7, 50


def sample(run: Run, tokens: int = TOKENS) -> tuple[str, str] | None:
    """Return a prompt and its continuation by the model as it is now, in its layout; None where there is none.

    That is in a run without text or of a classifier, with `train.sample_tokens=0`, under a chat template, whose special
    tokens no text spells, or in fp8 where `seq_len` is no multiple of what its products want. All processes call this
    together, and get the same text: that of one process, up to rounding.
    """
    cfg = run.cfg
    wanted = min(cfg.train.sample_tokens, tokens)
    unit = _tokens_together(cfg)
    if not wanted or cfg.data.kind in ("synthetic", *LABELLED) or cfg.seq_len % unit:
        return None
    if cfg.data.kind in EXAMPLES and "chat_template" in getattr(run.data.tokenizer, "described", ()):
        return None
    prompt = prompt_of(run)
    model = PackedLogits(run.state.parallel, multiple_of=unit)
    pieces: list[str] = []
    began = time.monotonic()
    eager = torch.compiler.set_stance("force_eager") if cfg.parallel.compile else contextlib.nullcontext()
    with eager:  # each length would be compiled anew
        for piece in sample_text(model, run.data.tokenizer, prompt, cfg, tokens=wanted):
            pieces.append(piece)
            late = run.processes.is_first and time.monotonic() - began > LONGEST_S
            if run.any_wants(late or bool(run.signals.received)):
                break
    return prompt, "".join(pieces)


def last_sample(run: Run) -> str:
    """Return the sample at the end of a run, with its prompt; empty where there is none.

    A failure (out of memory, say) is said in its place: the run itself has ended as it should.
    """
    try:
        with run.state.averaged():
            return "".join(sample(run, run.cfg.train.sample_tokens) or ())
    except Exception as error:
        return f"(none: {type(error).__name__}: {error})"


def _tokens_together(cfg: Config) -> int:
    """Return what a rank's number of tokens must be a multiple of: more than one in fp8 only."""
    if cfg.train.precision != "fp8":
        return 1
    return FLOAT8_GROUP if cfg.train.fp8_scaling == "block" else FLOAT8_ROWS


def prompt_of(run: Run) -> str:
    """Return what the samples of a run begin with: the first words held out, or Python's `def` where it reads that.

    Of examples it is the first prompt that is held out.
    """
    if run.cfg.data.path is None or not run.eval_batches:
        return PYTHON_PROMPT if run.cfg.data.path is None else ""
    batch = run.eval_batches[0]
    # Of examples, all that comes before the first answer: the position whose target it begins is the prompt's last.
    asked = (
        int((batch.targets[0] >= 0).int().argmax()) + 1 if run.cfg.data.kind in EXAMPLES else PROMPT_TOKENS
    )
    first: list[int] = batch.tokens[0, :asked].tolist()
    end = run.data.tokenizer.eos_id
    return run.data.tokenizer.decode(first[: first.index(end)] if end in first else first)


def sample_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, cfg: Config, *, tokens: int
) -> Iterator[str]:
    """Yield a sample of a run, piece by piece: the same settings at all times, so that samples compare."""
    sampling = Sampling(temperature=TEMPERATURE, top_k=TOP_K, seed=cfg.train.seed)
    request = TextRequest(prompt=prompt, tokens=tokens, sampling=sampling)
    for _, piece, _ in continue_texts(model, tokenizer, [request], context=cfg.seq_len):
        yield piece
