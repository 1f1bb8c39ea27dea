"""The training loop: step, measure, evaluate, save, stop."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

from megatrain.config.errors import UserError
from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.sinks import Observer
from megatrain.observe.watch import update as watch_update
from megatrain.resilience.signals import StopSignals
from megatrain.train.config import Config
from megatrain.train.evaluate import evaluate
from megatrain.train.run import Run
from megatrain.train.sample import sample
from megatrain.train.step import train_step

Row = dict[str, Any]
ABANDONED_S = 5.0
"""How long a failed run waits for its save in the background, in seconds."""


class DivergedError(UserError):
    """The loss or the gradient norm is not finite."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Requests:
    """Actions due after a step."""

    evaluate: bool = False
    save: bool = False
    stop: str = ""
    """Reason to stop: signal, done or stop_at; empty if the run continues."""


def requests_after(step: int, cfg: Config, *, stop_wanted: bool) -> Requests:
    """Return the actions due after step number `step` (the first is 1).

    `stop_wanted` says that a signal has reached any of the processes.
    """
    train = cfg.train
    done = step >= train.steps
    stop_at = train.stop_at is not None and step >= train.stop_at
    stop = "signal" if stop_wanted else "done" if done else "stop_at" if stop_at else ""
    return Requests(
        evaluate=done or _is_due(step, train.eval_every),
        save=bool(stop) or _is_due(step, cfg.checkpoint.every),
        stop=stop,
    )


def reason_to_stop(run: Run) -> str:
    """Return why a run that was resumed has nothing left to do (done, stop_at, early stop); empty if it has."""
    step = run.state.step
    stop = requests_after(step, run.cfg, stop_wanted=False).stop if step else ""
    return stop or ("" if _patience_left(run) else "early stop")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_loop(run: Run, observer: Observer, signals: StopSignals) -> str:
    """Train from the state's step until there is a reason to stop; return that reason.

    Raises:
        DivergedError: the loss or the gradient norm is not finite; nothing of that step was saved.
        CheckpointSaveError: a checkpoint could not be saved, and training must not go on without it.
    """
    try:
        return _train_until_stop(run, observer, signals)
    except Exception as error:
        all_together = isinstance(error, DivergedError)  # else the others may have ended
        run.saver.abandon(run.cfg.resilience.timeout_s if all_together else ABANDONED_S)
        if run.uploads is not None:
            run.uploads.abandon(ABANDONED_S)
        raise
    finally:
        _report_saves(run, observer)


def _train_until_stop(run: Run, observer: Observer, signals: StopSignals) -> str:
    cfg, state, saver = run.cfg, run.state, run.saver
    reset_peak_memory(state.parallel.device)
    ended = time.perf_counter()
    stalled = 0.0
    batches = run.loader.batches(state.step)
    if state.step == 0 and cfg.train.eval_every and run.eval_batches:
        observer.step({"step": 0} | _evaluate(run, observer))  # of the untrained model
        ended = time.perf_counter()
    while True:
        batch = next(batches)
        data_time = time.perf_counter() - ended
        lr = cfg.optim.lr * cfg.schedule.factor(state.step, cfg.train.steps)
        with signals.held_back() if cfg.parallel.compile else contextlib.nullcontext():
            stats = train_step(
                state,
                batch,
                cfg,
                lr=lr,
                wants_stop=lambda: bool(signals.received or run.cache_check.damage or saver.has_failed()),
            )
        loss, grad_norm, stop_wanted = stats.read()  # the only wait for the device in a step
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"the run diverged at step {state.step}: loss {loss}, gradient norm {grad_norm}. Nothing of this step "
                "was saved; the checkpoints are of earlier ones. Start another run (run.name=...) with a lower "
                "optim.lr, a longer schedule.warmup_steps or a lower optim.clip_norm; train.precision=fp32 tells "
                "whether it is the precision."
            )
        row: Row = {"step": state.step, "train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
        row |= {"train/tokens": state.tokens, "data/sample_digest": batch.digest}
        row |= _speed(run, time.perf_counter() - ended, data_time)
        if stalled:
            row["checkpoint/stall_s"], stalled = stalled, 0.0
        if stop_wanted and cfg.checkpoint.async_save:
            stop_wanted = _settle(run, signals)

        requests = requests_after(state.step, cfg, stop_wanted=stop_wanted)
        stop = requests.stop
        if requests.evaluate:
            row |= _evaluate(run, observer, train_loss=loss)
            stop = stop or ("" if _patience_left(run) else "early stop")
        observer.step(row)
        if requests.save or stop:
            stalled = run.save(eval_loss=row.get("eval/loss"), is_last=bool(stop), waits=stop != "signal")
        _report_saves(run, observer)
        report_uploads(run, observer)
        if stop:
            batches.close()  # type: ignore[attr-defined]
            return (signals.received or "signal to another process") if stop == "signal" else stop
        ended = time.perf_counter()


def _settle(run: Run, signals: StopSignals) -> bool:
    """Return whether a signal or damaged tokens made a rank ask for a stop; else settle the save that has failed."""
    if any(run.processes.gather(bool(signals.received or run.cache_check.damage))):
        return True  # the last save comes next, which refuses damaged tokens
    run.saver.settle()
    return False


def _report_saves(run: Run, observer: Observer) -> None:
    for report in run.saver.reports():
        if report.outcome == "saved":
            run.log.event("save", **report.facts)
        elif report.outcome == "failed":
            run.log.event("save_failed", **report.facts)
        else:
            run.log.event("save_skipped", **report.facts)
        if report.notice:
            observer.notice(report.notice)


def report_uploads(run: Run, observer: Observer) -> None:
    """Record what became of uploads to the durable tier.

    Raises:
        StaleOwnerError: the run goes on elsewhere.
    """
    for report in run.uploads.reports() if run.uploads is not None else ():
        run.log.event(report.event, **report.facts)
        if report.notice:
            observer.notice(report.notice)


def _speed(run: Run, step_time: float, data_time: float) -> Row:
    """Return the step's speed and memory under their metric names."""
    cfg = run.cfg
    row: Row = {"perf/step_time_s": step_time, "perf/data_time_s": data_time}
    row |= throughput(
        cfg.global_batch_size * cfg.seq_len,
        step_time,
        flops_per_token_full=run.flops_full,
        flops_per_token_causal=run.flops_causal,
        peak=run.peak,
        devices=run.processes.size,
    )
    row["memory/peak_gib"] = peak_memory_gib(run.state.parallel.device)
    return row


def _evaluate(run: Run, observer: Observer, *, train_loss: float | None = None) -> Row:
    """Validate if anything is held out, and show a sample; `train_loss` None: no step has been taken yet.

    Both use the moving average of the weights where one is kept.
    """
    if not run.eval_batches:
        return {}
    state = run.state
    with state.averaged():
        result = evaluate(state.parallel, run.eval_batches, run.data.token_bytes)
        if (text := sample(run)) is not None:
            observer.sample(state.step, *text)
    if train_loss is not None:
        state.watch, notice = watch_update(
            state.watch, step=state.step, train_loss=train_loss, eval_loss=result.loss
        )
        if notice is not None:
            observer.notice(notice)
    found: Row = {"eval/loss": result.loss}
    if result.bits_per_byte is not None:
        found["eval/bits_per_byte"] = result.bits_per_byte
    return found


def _patience_left(run: Run) -> bool:
    """Tell whether early stopping, if enabled, still waits for a new best validation loss."""
    patience = run.cfg.train.early_stop_patience
    return not patience or run.state.watch.get("without_best", 0) < patience
