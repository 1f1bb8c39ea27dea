"""The training loop: step, measure, evaluate, save, stop."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.loader import StepBatch
from megatrain.observe.goodput import HOURS_BETWEEN_FAILURES, best_interval, ledger
from megatrain.observe.metrics import ELAPSED, EVALUATION, peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.sinks import Observer
from megatrain.observe.watch import update as watch_update
from megatrain.optim.privacy import Accountant
from megatrain.parallel.fingerprints import Fingerprints, fingerprints
from megatrain.resilience.budget import TimeBudget
from megatrain.resilience.policy import TAKE, FailurePolicy, Verdict
from megatrain.resilience.signals import STARTED
from megatrain.runtime.stop_signals import held_back
from megatrain.train.config import Config
from megatrain.train.evaluate import CalledOffError, evaluate
from megatrain.train.failures import (
    DivergedError,
    ReplicasDifferError,
    diverged,
    note_skipped,
    recent_losses,
    require_equal_replicas,
    roll_back,
)
from megatrain.train.run import Run
from megatrain.train.sample import sample
from megatrain.train.step import StepStats, train_step

Row = dict[str, Any]
ABANDONED_S = 5.0
"""How long a failed run waits for its save in the background, in seconds."""
FIRST_SAVE_S = 10.0
"""What the first save of an attempt is expected to take at most, in seconds, where the time is limited."""
TIME_BUDGET = "time budget"
STEPS_TO_FIRST_SAVE = 10
STEPS_TIMED = 100
LEAST_SAVE_S = 0.01


@dataclass(frozen=True, slots=True)
class Requests:
    """Actions due after a step."""

    evaluate: bool = False
    tasks: bool = False
    save: bool = False
    stop: str = ""
    """Reason to stop: signal, done or stop_at; empty if the run continues."""


def requests_after(step: int, cfg: Config, *, stop_wanted: bool, next_save: int = 0) -> Requests:
    """Return the actions due after step number `step` (the first is 1).

    Args:
        stop_wanted: whether a signal has reached any of the processes.
        next_save: the step of the next checkpoint under `checkpoint.every=auto`.
    """
    every = cfg.checkpoint.every
    save_is_due = step >= next_save if every == "auto" else _is_due(step, every)
    train = cfg.train
    done = step >= train.steps
    stop_at = train.stop_at is not None and step >= train.stop_at
    stop = "signal" if stop_wanted else "done" if done else "stop_at" if stop_at else ""
    return Requests(
        evaluate=done or _is_due(step, train.eval_every),
        tasks=cfg.tasks.are_any and (done or _is_due(step, cfg.tasks.every)),
        save=bool(stop) or save_is_due,
        stop=stop,
    )


def still_owed(run: Run) -> Row:
    """Return the row whose validation the checkpoint owes; empty if the run is over and has made it since."""
    state = run.state
    is_last = state.owed and requests_after(state.step, run.cfg, stop_wanted=False).stop
    if is_last and run.processes.from_first(lambda: "eval/loss" in run.log.recorded(state.step)):
        return {}
    return state.owed


def reason_to_stop(run: Run) -> str:
    """Return why a run that was resumed has nothing left to do (done, stop_at, early stop); empty if it has."""
    step = run.state.step
    if run.state.owed:
        return ""
    stop = requests_after(step, run.cfg, stop_wanted=False).stop if step else ""
    return stop or ("" if _patience_left(run) else "early stop")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_loop(run: Run, observer: Observer) -> str:
    """Train from the state's step until there is a reason to stop; return that reason.

    Raises:
        DivergedError: a step was not finite, or spiked, more often than the config allows; its update was not made.
        ReplicasDifferError: ranks that must hold the same values do not.
        CheckpointSaveError: a checkpoint could not be saved, and training must not go on without it.
    """
    try:
        return _Attempt(run, observer).train()
    except Exception as error:
        all_together = isinstance(
            error, DivergedError | ReplicasDifferError
        )  # else the others may have ended
        run.saver.abandon(run.cfg.resilience.timeout_s if all_together else ABANDONED_S)
        if run.uploads is not None:
            run.uploads.abandon(ABANDONED_S)
        raise
    finally:
        _report_saves(run, observer)


class _Attempt:
    """The loop of one attempt, and what it keeps from step to step."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self.run, self.observer = run, observer
        self.policy = FailurePolicy(run.cfg.resilience, recent_losses(run))
        self.budget = TimeBudget(run.cfg.train.time_budget, first_save_s=FIRST_SAVE_S)
        self.ended = time.perf_counter()
        self.stalled = 0.0
        self.accountant = _accountant(run)
        self.step_times: deque[float] = deque(maxlen=STEPS_TIMED)
        self.next_save = run.state.step + STEPS_TO_FIRST_SAVE
        """Under `checkpoint.every=auto`."""

    def train(self) -> str:
        """Take steps, with what is due after each; return the reason to stop."""
        run, state, observer = self.run, self.run.state, self.observer
        reset_peak_memory(state.parallel.device)
        batches = self._batches()
        if state.step == 0 and run.cfg.train.eval_every and run.eval_batches:
            if not (found := _evaluate(run, observer)):  # of the untrained model
                return self._signal()
            observer.step({"step": 0, ELAPSED: time.monotonic() - STARTED} | found)
        elif state.owed and (stop := self._after_step(dict(state.owed), is_saved=True)):
            return self._signal() if stop == "signal" else stop
        self.ended = time.perf_counter()
        while True:
            run.processes.doing("batch", state.step + 1)
            batch = next(batches)
            data_time = time.perf_counter() - self.ended
            lr, (stats, verdict) = self._lr(), self._step(batch)
            if verdict.action == "roll back" and roll_back(run, self.policy, verdict, batch, observer):
                batches.close()  # type: ignore[attr-defined]
                batches, self.ended = self._batches(), time.perf_counter()
                continue
            run.processes.doing("result", state.step)
            loss, grad_norm, stop_wanted = stats.read()
            row: Row = {"step": state.step, "train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
            row |= {"train/tokens": state.tokens, "data/sample_digest": batch.digest}
            step_time = time.perf_counter() - self.ended
            row |= {f"train/{name}": value for name, value in stats.more().items()}
            row |= _speed(run, step_time, data_time)
            row[ELAPSED] = time.monotonic() - STARTED
            if self.accountant is not None:
                row |= self.accountant.after(state.step + state.batches_passed_over)
            if verdict.action != "take":
                note_skipped(run, verdict, batch, loss, grad_norm, observer)
            if stop := self._after_step(row, stop_wanted=stop_wanted):
                batches.close()  # type: ignore[attr-defined]
                return self._signal() if stop == "signal" else stop
            self.step_times.append(step_time)
            self.budget.note_step(time.perf_counter() - self.ended - self.stalled)
            self.ended = time.perf_counter()

    def _signal(self) -> str:
        return self.run.signals.received or "signal to another process"

    def _batches(self) -> Iterator[StepBatch]:
        state = self.run.state
        return self.run.loader.batches(state.step + state.batches_passed_over)

    def _lr(self) -> float:
        cfg, step = self.run.cfg, self.run.state.step
        return cfg.optim.lr * cfg.schedule.factor(step, cfg.train.steps)

    def _step(self, batch: StepBatch) -> tuple[StepStats, Verdict]:
        """Take a step, unless the policy finds that it must not be taken; return its results and the verdict."""
        cfg = self.run.cfg
        verdicts: list[Verdict] = []
        is_recorded = _is_due(self.run.state.step + 1, cfg.log.fingerprints_every)
        parallel, found = self.run.state.parallel, Fingerprints()

        def accepts(loss: float, grad_norm: float) -> bool:
            verdicts.append(self.policy.judge(loss, grad_norm))
            return verdicts[0].action == "take"

        self.run.processes.doing("training", self.run.state.step + 1)
        with held_back() if cfg.parallel.compile else contextlib.nullcontext():
            stats = train_step(
                self.run.state,
                batch,
                cfg,
                lr=self._lr(),
                wants_stop=self._wants_stop,
                accepts=accepts,
                on_gradients=(lambda g: found.update(fingerprints(parallel, g))) if is_recorded else None,
            )
        if is_recorded:
            _record_fingerprints(self.run, found)
        if not verdicts and not all(map(math.isfinite, stats.read()[:2])):  # an engine has made the update
            verdicts.append(Verdict("stop", "its loss or gradient norm is not finite"))
        verdict = verdicts[0] if verdicts else TAKE
        if verdict.action == "stop":
            raise diverged(self.run, verdict, stats)
        return stats, verdict

    def _wants_stop(self) -> bool:
        """Tell whether this rank has a reason to stop after the present step; any rank's stops all."""
        run = self.run
        if run.processes.is_first and self.budget.is_used_up():
            run.signals.request(TIME_BUDGET)
        return bool(run.signals.received or run.cache_check.damage or run.saver.has_failed())

    def _steps_to_next_save(self) -> int:
        """Return how many steps to take until the next checkpoint, so that the least time is lost."""
        try:
            between = ledger(self.run.directory).between_failures_s
        except UserError:  # the record can't be read
            between = HOURS_BETWEEN_FAILURES * 3600 / self.run.processes.size
        step_s = statistics.median(self.step_times or [1.0])
        return best_interval(max(self.stalled, LEAST_SAVE_S), between, step_s)

    def _after_step(self, row: Row, *, stop_wanted: bool = False, is_saved: bool = False) -> str:
        """Record, evaluate, compare and save what is due; return the reason to stop, or nothing.

        Args:
            is_saved: whether there is a checkpoint of this step already.
        """
        run, cfg, observer = self.run, self.run.cfg, self.observer
        if self.stalled:
            row["checkpoint/stall_s"], self.stalled = self.stalled, 0.0
        if stop_wanted and cfg.checkpoint.async_save:
            stop_wanted = _settle(run)
        requests = requests_after(run.state.step, cfg, stop_wanted=stop_wanted, next_save=self.next_save)
        stop = requests.stop
        run.state.owed = {}
        if requests.evaluate:
            found = _evaluate(run, observer, train_loss=row["train/loss"])
            if run.eval_batches and not found:
                run.state.owed, stop = dict(row), "signal"
            row |= found
            stop = stop or ("" if _patience_left(run) else "early stop")
            stop = stop or ("signal" if run.any_wants(bool(run.signals.received)) else "")
        if requests.tasks and stop != "signal":
            row |= _on_tasks(run)
            stop = stop or ("signal" if run.any_wants(bool(run.signals.received)) else "")
        observer.step(row)
        if _is_due(run.state.step, cfg.resilience.compare_replicas_every):
            require_equal_replicas(run)
        if (requests.save or stop) and not is_saved:
            self.stalled = run.save(
                eval_loss=row.get("eval/loss"), is_last=bool(stop), waits=stop != "signal"
            )
            self.budget.note_save(self.stalled)
            if cfg.checkpoint.every == "auto":
                self.next_save = run.state.step + run.processes.from_first(self._steps_to_next_save)
        _report_saves(run, observer)
        report_uploads(run, observer)
        return stop


def _record_fingerprints(run: Run, gradients: Fingerprints) -> None:
    """Write a row of what was found of the gradients, and of the weights after the step."""
    weights = fingerprints(run.state.parallel, run.state.weights.parameters)
    run.log.fingerprints({"step": run.state.step, "gradients": gradients, "weights": weights})


def _settle(run: Run) -> bool:
    """Return whether a signal or damaged tokens made a rank ask for a stop; else settle the save that has failed."""
    if any(run.processes.gather(bool(run.signals.received or run.cache_check.damage))):
        return True  # the last save comes next, which refuses damaged tokens
    run.saver.settle()
    return False


def _report_saves(run: Run, observer: Observer) -> None:
    for found in run.processes.notices():
        observer.notice(found["notice"])
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
        if report.event == "upload":
            run.log.event("upload", **report.facts)
        elif report.event == "upload_failed":
            run.log.event("upload_failed", **report.facts)
        else:
            run.log.event("upload_skipped", **report.facts)
        if report.notice:
            observer.notice(report.notice)


def _accountant(run: Run) -> Accountant | None:
    """Return what tells the epsilon of a private run, on the process that records it; None elsewhere."""
    cfg = run.cfg
    if not cfg.privacy.is_on or not run.processes.is_first:
        return None
    return Accountant(cfg.privacy, samples=run.loader.n_samples, batch=cfg.global_batch_size)


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

    Both use the moving average of the weights where one is kept. A signal calls them off; empty then.
    """
    if not run.eval_batches:
        return {}
    state, began = run.state, time.perf_counter()
    run.processes.doing("evaluating", state.step)
    with state.averaged():
        try:
            result = evaluate(
                state.parallel,
                run.eval_batches,
                run.data.token_bytes,
                objective=state.objective,
                is_called_off=lambda: run.any_wants(bool(run.signals.received)),
            )
        except CalledOffError:
            return {}
        if (text := sample(run)) is not None:
            observer.sample(state.step, *text)
    if train_loss is not None:
        state.watch, notice = watch_update(
            state.watch, step=state.step, train_loss=train_loss, eval_loss=result.loss
        )
        if notice is not None:
            observer.notice(notice)
    found: Row = {"eval/loss": result.loss, EVALUATION: time.perf_counter() - began}
    if result.bits_per_byte is not None:
        found["eval/bits_per_byte"] = result.bits_per_byte
    return found | {f"eval/{name}": value for name, value in result.more.items()}


def _on_tasks(run: Run) -> Row:
    """Evaluate the model on the config's tasks, record the results, and return their numbers by name."""
    if run.tasks is None:
        return {}
    run.processes.doing("evaluating on tasks", run.state.step)
    with run.state.averaged():
        found = run.tasks(run)
    run.log.event("tasks", step=run.state.step, results=found)
    return {
        f"tasks/{task}/{name}": value
        for task, values in found.items()
        for name, value in values.items()
        if type(value) in (int, float)
    }


def _patience_left(run: Run) -> bool:
    """Tell whether early stopping, if enabled, still waits for a new best validation loss."""
    patience = run.cfg.train.early_stop_patience
    return not patience or run.state.watch.get("without_best", 0) < patience
