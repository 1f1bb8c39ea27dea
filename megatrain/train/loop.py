"""The training loop: step, measure, ask the hooks, do what they request."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.sinks import Observer
from megatrain.observe.watch import update as watch_update
from megatrain.optim.schedule import lr_factor
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.device import Peak
from megatrain.train.build import Parts
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.hooks import EarlyStop, IntervalTriggers, Request, StepFacts, StopOnSignal, ask
from megatrain.train.step import StepStats, train_step

Row = dict[str, Any]


class DivergedError(RuntimeError):
    """The loss or the gradient norm is not finite."""


@dataclass(frozen=True)
class Run:
    """What the loop needs beside the parts: where facts go, and what throughput is measured against."""

    cfg: Config
    parts: Parts
    observer: Observer
    signals: StopSignals
    save: Callable[[], None]
    token_bytes: np.ndarray | None
    flops_full: float
    """FLOPs a token, every query against every key."""
    flops_causal: float
    processes: int
    peak: Peak | None
    """Of one process."""


def train_loop(run: Run) -> str:
    """Train from the state's step until a hook asks to stop; return why in a word.

    Raises:
        DivergedError: the loss or the gradient norm is not finite; nothing of that step was saved.
    """
    cfg, state = run.cfg, run.parts.state
    hooks = (IntervalTriggers(cfg), StopOnSignal(), EarlyStop())
    reset_peak_memory(next(state.model.parameters()).device)
    ended = time.perf_counter()
    batches = run.parts.loader.batches(state.step)
    while True:
        batch = next(batches)
        data_time = time.perf_counter() - ended
        lr = cfg.optim.lr * lr_factor(cfg.schedule, state.step, total_steps=cfg.train.steps)
        stats = train_step(state, batch, cfg, lr=lr, wants_stop=lambda: run.signals.received is not None)
        row = _losses(stats, step=state.step)
        step_time = time.perf_counter() - ended
        row |= {"train/lr": lr, "train/tokens": state.tokens, "data/sample_digest": batch.digest}
        row |= _speed(run, step_time, data_time)

        facts = StepFacts(step=state.step, stop_wanted=stats.stop_wanted.item() > 0)
        request = ask(hooks, facts)
        if Request.EVALUATE in request:
            row |= _evaluate(run, row)
            request |= ask(hooks, dataclasses.replace(facts, patience_left=_patience_left(run)))
        run.observer.step(row)
        if Request.SAVE in request:
            run.save()
        if Request.STOP in request:
            batches.close()  # type: ignore[attr-defined]
            return _reason(run, facts)
        ended = time.perf_counter()


def _losses(stats: StepStats, *, step: int) -> Row:
    """The step's own results; reading them waits for the device."""
    loss, grad_norm = stats.loss.item(), stats.grad_norm.item()
    if not (np.isfinite(loss) and np.isfinite(grad_norm)):
        raise DivergedError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the last checkpoint is from before"
        )
    return {"step": step, "train/loss": loss, "train/grad_norm": grad_norm}


def _speed(run: Run, step_time: float, data_time: float) -> Row:
    cfg = run.cfg
    row: Row = {"perf/step_time_s": step_time, "perf/data_time_s": data_time}
    row |= throughput(
        cfg.global_batch_size * cfg.seq_len,
        step_time,
        flops_per_token_full=run.flops_full,
        flops_per_token_causal=run.flops_causal,
        peak=run.peak,
        devices=run.processes,
    )
    row["memory/peak_gib"] = peak_memory_gib(run.parts.state.parallel.device)
    return row


def _evaluate(run: Run, row: Row) -> Row:
    """Validation results, if anything is held out; counters and notices of the over-fitting watch."""
    if not run.parts.eval_batches:
        return {}
    state = run.parts.state
    result = evaluate(state.parallel, run.parts.eval_batches, run.token_bytes)
    state.watch, notice = watch_update(
        state.watch, step=state.step, train_loss=row["train/loss"], eval_loss=result.loss
    )
    if notice is not None:
        run.observer.notice(notice)
    found: Row = {"eval/loss": result.loss}
    if result.bits_per_byte is not None:
        found["eval/bits_per_byte"] = result.bits_per_byte
    return found


def _patience_left(run: Run) -> bool:
    patience = run.cfg.train.early_stop_patience
    return not patience or run.parts.state.watch.get("without_best", 0) < patience


def _reason(run: Run, facts: StepFacts) -> str:
    if facts.stop_wanted:
        return run.signals.received or "signal to another process"
    state, train = run.parts.state, run.cfg.train
    if state.step >= train.steps:
        return "done"
    return "stop_at" if train.stop_at is not None and state.step >= train.stop_at else "early stop"
