"""One training run: check everything first, then write, train, save and report the exit code."""

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.errors import UnknownFormatError
from megatrain.checkpoint.manifest import installed_versions
from megatrain.checkpoint.store import Checkpointer, VerifiedCheckpoint
from megatrain.config.errors import DamagedCheckpointError, StopRequested, UserError
from megatrain.config.load import digest, dump
from megatrain.data.background import CacheCheck
from megatrain.data.prepare import Prepared
from megatrain.observe.display import Display, make_display
from megatrain.observe.report.page import report_at_end
from megatrain.observe.rundir import NoLog, RunLog
from megatrain.observe.sinks import Observer
from megatrain.resilience.preflight import require_same_data
from megatrain.resilience.signals import STARTED, StopSignals
from megatrain.runtime.device import choose_precision, device_name, memory_bytes, pick_device
from megatrain.runtime.launch import SAVED_BY_SIGNAL
from megatrain.runtime.ownership import Ownership, StaleOwnerError, is_own, take
from megatrain.runtime.processes import Processes, redirect_output
from megatrain.train.adopt import adopted, require_readable, require_same_base
from megatrain.train.auto import require_memory, resolve_auto, with_precision
from megatrain.train.base import load_base, load_beside, with_base
from megatrain.train.build import (
    build_eval_batches,
    build_loader,
    build_state,
    left_out_of,
    prepare_together,
    with_layout,
)
from megatrain.train.config import Config
from megatrain.train.durable import fetch_run
from megatrain.train.federation import note_round, take_up_round
from megatrain.train.files import (
    CONFIG_FILE,
    new_run_id,
    read_config,
    require_own_checkpoint,
    run_directory,
    saved_config,
    write_config,
)
from megatrain.train.imported import (
    Progress,
    is_untrained_import,
    require_imported_weights,
    take_up_weights,
)
from megatrain.train.labels import settle_labels
from megatrain.train.loop import reason_to_stop, report_uploads, still_owed, train_loop
from megatrain.train.machines import check_likeness, make_checked_mesh
from megatrain.train.objective import Objective
from megatrain.train.objectives import begin_objective, build_objective
from megatrain.train.resume import check_same_data, check_same_run
from megatrain.train.run import Run
from megatrain.train.sample import last_sample
from megatrain.train.state import TrainState
from megatrain.train.words import Outcome, beginning, outcome


def run(
    cfg: Config,
    processes: Processes,
    signals: StopSignals,
    *,
    tasks: Callable[[Run], dict[str, Any]] | None = None,
) -> Outcome:
    """Train as `cfg` says, resuming if the run directory has a checkpoint; return how that ended.

    All `processes` call this with the same `cfg`.

    Args:
        tasks: evaluates the model of a run on the tasks of `cfg`; None: there are none.

    Raises:
        UserError: the config, the data or the run directory is invalid; nothing was written.
        StopRequested: a signal came before there was anything to save.
    """
    cfg = with_layout(cfg, processes.size)
    processes.limit_waits(cfg.resilience.timeout_s)
    directory = run_directory(cfg)
    checkpointer = Checkpointer(directory / "checkpoints", cfg.checkpoint, processes)
    display = make_display(cfg.log.display if processes.is_first else "off")
    try:
        return _attempt(cfg, checkpointer, display, signals, tasks=tasks)
    except BaseException as error:
        stop = signals.stop_behind(error)
        if stop is None:
            raise
        if processes.is_first:
            _record_stop(directory, cfg, stop, checkpointer)
        raise stop from (None if stop is error else error)
    finally:
        display.close()


def _attempt(
    cfg: Config,
    checkpointer: Checkpointer,
    display: Display,
    signals: StopSignals,
    *,
    tasks: Callable[[Run], dict[str, Any]] | None,
) -> Outcome:
    """Build all parts of the run, and train."""
    processes, directory = checkpointer.processes, run_directory(cfg)
    device = pick_device(processes.local_rank)
    progress = display.phase
    fetched = processes.from_first(partial(fetch_run, cfg, directory, progress=progress))
    cfg = processes.from_first(partial(_settle, cfg, directory, checkpointer, device, progress))
    processes.describe(directory=str(directory.absolute()))
    hosts, notices = check_likeness(processes, cfg.resilience, device)
    processes.doing("preparing the data")
    cfg, data = _data(cfg, processes, display.phase)
    mesh, told = make_checked_mesh(cfg, processes, hosts, device)
    check = CacheCheck(data.directory, verifies=cfg.data.verify != "never" and processes.local_rank == 0)
    loader = build_loader(cfg, data.train, mesh, on_damage=check.note)
    eval_batches = processes.agree(lambda: check.guard(lambda: build_eval_batches(cfg, data.val)))
    state = build_state(cfg, device, mesh)
    state.objective = _objective(cfg, state, data, checkpointer)
    with (
        contextlib.closing(check),
        contextlib.closing(state),
        _owned(directory, checkpointer, state, cfg.run.id) as require_owner,
    ):
        return _train(
            Run(
                cfg=cfg,
                directory=directory,
                processes=processes,
                data=data,
                cache_check=check,
                state=state,
                loader=loader,
                eval_batches=eval_batches,
                checkpointer=checkpointer,
                display=display,
                log=(RunLog if processes.is_first else NoLog)(directory, cfg.run.id, require_owner),
                signals=signals,
                notices=(*notices, *told, *left_out_of(loader)),
                fetched=fetched,
                tasks=tasks,
            )
        )


def _data(cfg: Config, processes: Processes, progress: Progress) -> tuple[Config, Prepared]:
    """Prepare the data, which is the same for all processes; return `cfg` with what it takes from the data."""
    data = prepare_together(cfg, processes, progress=progress)
    require_same_data(processes, data.fingerprint)
    return processes.agree(partial(settle_labels, cfg, data))


def _objective(
    cfg: Config, state: TrainState, data: Prepared, checkpointer: Checkpointer
) -> Objective | None:
    """Return what the run minimizes, unless it is likelihood."""
    build = partial(build_objective, cfg, state.parallel, data.tokenizer, train=data.train, val=data.val)
    return checkpointer.processes.agree(lambda: build(checkpointer=checkpointer))


def _record_stop(directory: Path, cfg: Config, stop: StopRequested, checkpointer: Checkpointer) -> None:
    """Record that a signal came before the first step of the attempt, if the run is this process's own."""
    if not is_own(directory):
        return
    log, step = RunLog(directory, cfg.run.id), max(checkpointer.steps(), default=0)
    log.event("stop", step=step, reason=stop.reason)
    log.status("stopped", step=step, reason=stop.reason, exit_code=stop.exit_code)


def _settle(
    cfg: Config, directory: Path, checkpointer: Checkpointer, device: torch.device, progress: Progress
) -> Config:
    """Resolve every `auto` of `cfg`, give the run its id, and compare it with the config in its directory.

    A Hugging Face directory that it adopts is imported first.

    This spares a long preparation of data that would end in a refusal; what counts is compared once more with the
    checkpoint itself, when the directory is this process's own (`_resume`).

    A directory without a committed checkpoint has nothing to resume, so its config is not compared. One with only
    damaged checkpoints is refused on loading, when the directory is locked and status.json can record the failure.
    """
    cfg = with_base(cfg, checkpointer, progress=progress)
    frozen = read_config(directory) if checkpointer.steps() else None
    if frozen is None and cfg.train.resume == "must" and not checkpointer.has_damaged():
        raise UserError(
            f"train.resume=must, but {directory} has no checkpoint to resume from. "
            "Check run.name and run.dir, or start a new run with train.resume=auto."
        )
    if frozen is not None and cfg.train.resume == "never":
        raise UserError(
            f"train.resume=never, but {directory} has checkpoints. Choose another run.name, remove the directory, "
            "or resume with train.resume=auto."
        )
    require_imported_weights(directory, checkpointer)
    if cfg.checkpoint.adopt is not None and frozen is None:
        require_readable(*adopted(cfg, checkpointer))
    cfg = _with_id(cfg, directory)
    if is_untrained_import(directory, checkpointer):
        frozen = None  # its config names the model only; the recipe and the data are free
    if cfg.train.precision == "auto":
        cfg = with_precision(cfg, choose_precision(device) if frozen is None else frozen.train.precision)
    memory = memory_bytes(device, checkpointer.processes.local_size)
    require_memory(cfg, memory)
    if frozen is not None:
        frozen = resolve_auto(frozen, memory=memory)
    cfg = resolve_auto(cfg, memory=memory, before=frozen)
    if frozen is not None:
        check_same_run(frozen, cfg)
    return cfg


def _with_id(cfg: Config, directory: Path) -> Config:
    """Return `cfg` with the id of the run in `directory`, or a new one.

    Raises:
        UserError: the directory is that of a run with another id than `cfg` has.
    """
    known = read_config(directory).run.id if (directory / CONFIG_FILE).is_file() else ""
    if known and cfg.run.id not in ("", known):
        raise UserError(
            f"{directory} is the run {known}, not run.id={cfg.run.id}. Choose another run.name, or leave run.id out."
        )
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, id=known or cfg.run.id or new_run_id()))


@contextlib.contextmanager
def _owned(
    directory: Path, checkpointer: Checkpointer, state: TrainState, run_id: str
) -> Iterator[Callable[[], None]]:
    """Own the run directory in the block, and check that it is writable and has space for a checkpoint.

    Files created for these checks are removed if they fail. Yields the check that this process still owns it.
    """
    owners: list[Ownership] = []
    processes = checkpointer.processes
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            checkpointer.preflight(state.tensors())
            processes.from_first(lambda: owners.append(_taken(directory, stack, run_id)))
        except UserError:
            for path in (checkpointer.directory, *made):
                with contextlib.suppress(OSError):  # not empty, so it stays
                    path.rmdir()
            raise
        if not processes.is_first:
            redirect_output(directory / "logs" / f"rank-{processes.rank}.log")
            yield lambda: None
            return
        checkpointer.require_owner = owners[0].require
        yield owners[0].require


def _taken(directory: Path, stack: contextlib.ExitStack, run_id: str) -> Ownership:
    """Become the owner of `directory`, unless it has become another run's since its config was compared."""
    ownership = take(directory, stack)
    if (directory / CONFIG_FILE).is_file() and (found := read_config(directory).run.id) not in ("", run_id):
        raise UserError(
            f"Another run ({found}) was started in {directory} while this one was being prepared. Start the command "
            "again to resume that one, or choose another run.name."
        )
    return ownership


def _train(run: Run) -> Outcome:
    """Resume, train, record status and events, and write the report, however it ends."""
    cfg, log, state = run.cfg, run.log, run.state
    run.processes.doing("loading")
    try:
        warnings = _resume(run)
    except (DamagedCheckpointError, UnknownFormatError) as error:
        _record_failure(run, 0, error)
        raise
    is_first = run.processes.is_first
    sinks = cfg.log if is_first else dataclasses.replace(cfg.log, wandb="off", tensorboard=False)
    observer = Observer(run.directory, sinks, run.display, log, dump(cfg))
    for warning in (*run.notices, *warnings):
        observer.notice(warning)
    run.display.start(beginning(run))
    run.signals.defer()
    log.status("running", step=state.step, reason="")
    try:
        run.processes.from_first(run.begin_uploads)
        reason = reason_to_stop(run) or train_loop(run, observer)
        try:
            run.finish_uploads()
        finally:
            report_uploads(run, observer)
    except BaseException as error:
        _record_failure(run, state.step, error)
        raise
    finally:
        observer.close()
    finished = reason in ("done", "early stop")
    exit_code = 0 if finished or reason == "stop_at" else SAVED_BY_SIGNAL
    log.event("stop", step=state.step, reason=reason)
    log.status("done" if finished else "stopped", step=state.step, reason=reason, exit_code=exit_code)
    if run.uploads is not None:
        run.uploads.copy_records()
    has_report = is_first and report_at_end(run.directory)
    by_signal = exit_code == SAVED_BY_SIGNAL
    text = "" if by_signal or cfg.log.display == "off" else last_sample(run)
    return outcome(run, reason, exit_code, has_report=has_report, sample=text)


def _record_failure(run: Run, step: int, error: BaseException) -> None:
    if isinstance(error, StaleOwnerError):
        return  # the record is somebody else's
    error = run.processes.explain(error)
    text = f"{type(error).__name__}: {error}"
    run.log.event("failure", step=step, error=text)
    run.log.status("failed", step=step, reason=text, exit_code=getattr(error, "exit_code", 1))
    if run.processes.is_first:
        report_at_end(run.directory)


def _resume(run: Run) -> tuple[str, ...]:
    """Load the newest checkpoint, if there is one, and open the run's files; returns warnings.

    Raises:
        UserError: the checkpoint is another run's, or was made with a config that must not change.
    """
    cfg, state, log = run.cfg, run.state, run.log
    began = time.monotonic()
    run.processes.from_first(run.checkpointer.remove_leftovers)
    found: VerifiedCheckpoint | None = None
    source: VerifiedCheckpoint | None = None
    changes: dict[str, Any] = {}
    base = load_base(cfg, run.checkpointer, state) if cfg.lora.rank else None
    beside = base or load_beside(cfg, run.checkpointer, state)
    if run.processes.from_first(lambda: is_untrained_import(run.directory, run.checkpointer)):
        source = take_up_weights(run.checkpointer, state, moments=True)
        require_own_checkpoint(source.manifest.info, source.path, cfg.run.id)
    elif found := run.checkpointer.load(tensors := state.tensors()):
        info = found.manifest.info
        require_own_checkpoint(info, found.path, cfg.run.id)
        if (saved := saved_config(info, found.path)) is not None:
            changes = check_same_run(saved, cfg)
        check_same_data(info["data_fingerprint"], run.data.fingerprint, cfg)
        require_same_base(info, beside, found.path)
        state.restore(found.state, tensors)
        source = take_up_round(cfg, run.checkpointer, state, found)
    elif cfg.checkpoint.adopt is not None and base is None:
        other, step = adopted(cfg, run.checkpointer)
        source = take_up_weights(other, state, step=step)
        note_round(state, source)
    unverified = None if found is None else found.manifest.info.get("data_unverified_since")
    run.cache_check.begin(state.step, unverified_since=unverified)
    source = source or base
    if found is None:
        begin_objective(state, run.loader, run.eval_batches)
    loaded = found or source
    warnings = (run.fetched.warnings if run.fetched else ()) + (() if loaded is None else loaded.warnings)
    run.processes.from_first(lambda: _write_inputs(run))
    state.owed = still_owed(run)
    log.open(state.step, owes_row=bool(state.owed))
    machine = {
        "host": platform.node(),
        "device": device_name(state.parallel.device),
        "processes": run.processes.size,
    }
    fields = {"step": state.step, "config": digest(cfg), "seed": cfg.train.seed, "changes": changes}
    fields |= {"machine": machine, "versions": installed_versions(), "lost": log.lost}
    now = time.monotonic()
    fields |= {"elapsed_s": now - STARTED, "load_s": now - began}
    if run.fetched is not None and run.fetched.step is not None:
        log.event("fetch", step=run.fetched.step, url=run.fetched.url)
    if source is not None:
        facts = {"run_id": source.manifest.info.get("run_id"), "step": source.step}
        fields["weights_from"] = {"checkpoint": str(source.path), **facts}
    log.event("start" if found is None else "resume", **fields)
    if run.data.contents is not None:
        log.event("data", **run.data.contents.as_json())
    return warnings


def _write_inputs(run: Run) -> None:
    """Write the files beside the checkpoints that resuming and using the model require."""
    run.checkpointer.require_owner()  # loading may have taken long
    write_config(run.directory, run.cfg)
    run.data.tokenizer.save(run.directory / "tokenizer")
