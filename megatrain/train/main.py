"""One run from its config to its exit code: check everything first, then write, train, save and report."""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.store import Checkpointer
from megatrain.config.errors import DamagedCheckpointError, UserError
from megatrain.config.load import digest, dump
from megatrain.data.prepare import Prepared, prepare
from megatrain.models.flops import flops_per_token, n_params
from megatrain.observe.display import Display, make_display
from megatrain.observe.rundir import NoLog, RunLog
from megatrain.observe.sinks import Observer
from megatrain.parallel.layout import describe
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.device import choose_precision, peak_flops, pick_device
from megatrain.runtime.launch import SAVED_BY_SIGNAL
from megatrain.runtime.processes import Processes, redirect_output
from megatrain.train.build import COMPUTE_DTYPE, Parts, build_parts, with_layout
from megatrain.train.config import Config
from megatrain.train.files import read_config, run_directory, write_config
from megatrain.train.loop import Run, train_loop
from megatrain.train.resume import check_same_data, check_same_run


@dataclass(frozen=True)
class Attempt:
    """One process's work on a run: what was settled and opened before the first step."""

    cfg: Config
    directory: Path
    data: Prepared
    parts: Parts
    checkpointer: Checkpointer
    display: Display
    log: RunLog
    changes: dict[str, Any]
    """Keys that differ from the run's former config, and were allowed to: key -> (old, new)."""


def run(cfg: Config, processes: Processes) -> int:
    """Train as `cfg` says, resuming if the run directory has a checkpoint; returns the exit code.

    All `processes` call this with the same `cfg`.

    Raises:
        UserError: the config, the data or the run directory is wrong; nothing was written.
    """
    cfg = with_layout(cfg, processes.size)
    directory = run_directory(cfg)
    device = pick_device(processes.local_rank)
    checkpointer = Checkpointer(directory / "checkpoints", cfg.checkpoint, processes)
    cfg, changes = processes.from_first(partial(_settle, cfg, directory, checkpointer, device))
    display = make_display(cfg.log.display if processes.is_first else "off")
    try:
        data = processes.agree(
            lambda: prepare(cfg.data, progress=display.phase, vocab_size=cfg.model.vocab_size)
        )
        _require_same(processes.gather(data.fingerprint))
        parts = build_parts(cfg, data, device, processes)
        with _owned(directory, checkpointer, parts):
            log = RunLog(directory) if processes.is_first else NoLog(directory)
            return _train(Attempt(cfg, directory, data, parts, checkpointer, display, log, changes))
    finally:
        display.close()


def _require_same(fingerprints: list[str]) -> None:
    if len(set(fingerprints)) > 1:
        raise UserError(
            "The processes read different data: data.path holds other content on some machines "
            f"(fingerprints {', '.join(sorted({each[:12] for each in fingerprints}))})."
        )


def _settle(
    cfg: Config, directory: Path, checkpointer: Checkpointer, device: torch.device
) -> tuple[Config, dict[str, Any]]:
    """The config with nothing left to be found out, and how it differs from the one the run had before.

    A directory without a committed checkpoint holds nothing that could go on, so it is not compared with. One with
    damaged checkpoints alone is refused later, by whoever loads: then the run is ours, and its status can say so.
    """
    frozen = read_config(directory) if checkpointer.steps() else None
    if frozen is None and cfg.train.resume == "must" and not checkpointer.has_damaged():
        raise UserError(
            f"train.resume=must, but {directory} has no checkpoint to resume from. "
            "Check run.name and run.dir, or start anew with train.resume=auto."
        )
    if frozen is not None and cfg.train.resume == "never":
        raise UserError(
            f"train.resume=never, but {directory} has checkpoints. Take another run.name, remove the directory, "
            "or go on with train.resume=auto."
        )
    if cfg.train.precision == "auto":
        precision = choose_precision(device) if frozen is None else frozen.train.precision
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))
    return cfg, {} if frozen is None else check_same_run(frozen, cfg)


@contextlib.contextmanager
def _owned(directory: Path, checkpointer: Checkpointer, parts: Parts) -> Iterator[None]:
    """The run directory: writable, with room for a checkpoint, and used by this run alone.

    What was made to find that out is removed again when it fails.
    """
    processes = checkpointer.processes
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            checkpointer.preflight(parts.state.tensors())
            processes.from_first(lambda: _lock(directory, stack))
        except UserError:
            for path in (checkpointer.directory, *made):
                with contextlib.suppress(OSError):  # it holds something, so it stays
                    path.rmdir()
            raise
        if not processes.is_first:
            redirect_output(directory / "logs" / f"rank-{processes.rank}.log")
        yield


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Keep other runs out of `directory` until `stack` is left."""
    try:
        lock = stack.enter_context((directory / ".lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another process is training in {directory}. Wait for it, stop it, or take another run.name."
        ) from None
    except OSError as error:
        raise UserError(f"{directory} can't be written: {error}") from None


def _train(attempt: Attempt) -> int:
    """Take up the state, train, and leave status and events behind; returns the exit code."""
    cfg, log, state = attempt.cfg, attempt.log, attempt.parts.state
    try:
        warnings = _take_up(attempt)
    except DamagedCheckpointError as error:
        _record_failure(log, 0, error)
        raise
    is_first = attempt.checkpointer.processes.is_first
    sinks = cfg.log if is_first else dataclasses.replace(cfg.log, wandb="off", tensorboard=False)
    observer = Observer(attempt.directory, sinks, attempt.display, log, dump(cfg))
    for warning in warnings:
        observer.notice(warning)
    attempt.display.start(cfg.train.steps, state.step, _title(attempt))
    log.status("running", step=state.step, reason="")
    try:
        with StopSignals() as signals:
            reason = (
                "done" if state.step >= cfg.train.steps else train_loop(_make_run(attempt, observer, signals))
            )
    except BaseException as error:
        _record_failure(log, state.step, error)
        raise
    finally:
        observer.close()
    finished = reason in ("done", "early stop")
    exit_code = 0 if finished or reason == "stop_at" else SAVED_BY_SIGNAL
    log.event("stop", step=state.step, reason=reason)
    log.status("done" if finished else "stopped", step=state.step, reason=reason, exit_code=exit_code)
    return exit_code


def _record_failure(log: RunLog, step: int, error: BaseException) -> None:
    text = f"{type(error).__name__}: {error}"
    log.event("failure", step=step, error=text)
    log.status("failed", step=step, reason=text, exit_code=getattr(error, "exit_code", 1))


def _take_up(attempt: Attempt) -> tuple[str, ...]:
    """Load the newest checkpoint, if there is one, and open the run's files; returns warnings."""
    cfg, state, log = attempt.cfg, attempt.parts.state, attempt.log
    processes = attempt.checkpointer.processes
    processes.from_first(attempt.checkpointer.remove_leftovers)
    found = attempt.checkpointer.load(state.tensors())
    if found is not None:
        check_same_data(found.manifest.info["data_fingerprint"], attempt.data.fingerprint, cfg)
        state.restore(found.state)
    processes.from_first(lambda: _write_facts(attempt))
    log.open(state.step)
    facts = {"step": state.step, "config": digest(cfg), "seed": cfg.train.seed, "changes": attempt.changes}
    log.event("start" if found is None else "resume", **facts)
    return () if found is None else found.warnings


def _write_facts(attempt: Attempt) -> None:
    """What a later resume, and whoever uses the model, needs beside the checkpoints."""
    write_config(attempt.directory, attempt.cfg)
    attempt.data.tokenizer.save(attempt.directory / "tokenizer")


def _title(attempt: Attempt) -> str:
    """One line about the run."""
    cfg = attempt.cfg
    size = n_params(cfg.model) / 1e6
    processes = attempt.checkpointer.processes.size
    layout = f"{processes} processes ({describe(cfg.parallel)}), " if processes > 1 else ""
    return (
        f"{cfg.run.name}: {cfg.model.kind} {size:.1f}M parameters, {layout}{cfg.train.precision}, "
        f"{attempt.parts.loader.store.n_tokens / 1e6:.1f}M training tokens, seed {cfg.train.seed}"
    )


def _make_run(attempt: Attempt, observer: Observer, signals: StopSignals) -> Run:
    cfg, state = attempt.cfg, attempt.parts.state
    info = {
        "data_fingerprint": attempt.data.fingerprint,
        "config_digest": digest(cfg),
        "layout": dump(cfg.parallel),
    }

    def save() -> None:
        path = attempt.checkpointer.save(state.step, state.tensors(), state.facts(), info)
        attempt.log.event("save", step=state.step, path=path.name)

    return Run(
        cfg=cfg,
        parts=attempt.parts,
        observer=observer,
        signals=signals,
        save=save,
        token_bytes=attempt.data.token_bytes,
        flops_full=flops_per_token(cfg.model, cfg.seq_len, causal=False),
        flops_causal=flops_per_token(cfg.model, cfg.seq_len, causal=True),
        processes=attempt.checkpointer.processes.size,
        peak=peak_flops(state.cut.device, COMPUTE_DTYPE[cfg.train.precision]),
    )
