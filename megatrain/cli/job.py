"""Common part of every verb that takes a config: parse, compose, check; then print, sweep or run."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial

from megatrain.cli.compose import Source, compose
from megatrain.cli.options import parse_options
from megatrain.cli.sweep import plan_sweep, run_sweep
from megatrain.config.docs import json_schema
from megatrain.config.errors import UserError
from megatrain.config.text import to_yaml
from megatrain.engines.config import require_engine
from megatrain.parallel.layout import fill, layout_summary, world_size
from megatrain.runtime.launch import start_here
from megatrain.runtime.processes import Processes, is_started, require_promised_size, telling_launcher
from megatrain.runtime.slurm import name_task
from megatrain.runtime.stop_signals import take_signals
from megatrain.train.config import Config

JOINING_LEAST_S = 60.0
"""How long processes wait for one another at least when they start: imports alone take long on a busy machine."""
PROCESSES_PER_CORE = 16
"""Processes per core that a machine without GPUs may be asked to start: more of them would only fill its memory."""


def run_job(
    verb: str, argv: list[str], job: Callable[[Config], int], processes: Processes | None = None
) -> int:
    """Run `job` on the config that the command line describes; returns the exit code.

    The first of `processes` composes it for all.

    `--cfg job` prints the config instead, and `--multirun` starts a fresh process for every combination.

    Raises:
        UserError: the command line or a config is invalid; nothing was run.
    """
    options = parse_options(verb, argv)
    source = Source(options.config_dir, options.config_name, options.starts_from_base)
    if options.cfg == "schema":
        print(json.dumps(json_schema(Config), indent=2))
        return 0
    if options.multirun and is_started():
        raise UserError("--multirun starts the processes of each job itself: run it without torchrun.")
    if options.multirun:
        jobs = plan_sweep(options.overrides, source)
        if options.cfg != "job":
            return run_sweep(verb, jobs, source)
        print("---\n".join(to_yaml(each.cfg) for each in jobs), end="")
        return 0
    cfg = (processes or Processes()).from_first(lambda: compose(options.overrides, source))
    if options.cfg == "job":
        print(to_yaml(cfg), end="")
        return 0
    return job(cfg)


def run_in_layout(
    verb: str, argv: list[str], words: list[str], job: Callable[[Config, Processes], int]
) -> int:
    """Run `job` as `run_job` does, in as many processes as the layout needs; start them unless a launcher has.

    Args:
        argv: the arguments after the verb. words: those of them that describe the config.
    """

    def start_or_do(processes: Processes, cfg: Config) -> int:
        require_engine(cfg.engine)
        needed = _processes_needed(cfg)
        if needed > 1 and not is_started():
            command = [sys.executable, "-m", "megatrain", verb, *argv]
            return start_here(command, needed, explain=partial(_log_of, cfg))
        return job(cfg, processes)

    take_signals()
    name_task()
    require_promised_size()
    if not is_started():
        return run_job(verb, words, partial(start_or_do, Processes()))
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else each part of a wait at the store is a warning
    from megatrain.runtime.group import joined  # imports torch

    with telling_launcher(), joined(**_limit(words)) as processes:
        return run_job(verb, words, partial(start_or_do, processes), processes)


def _limit(words: list[str]) -> dict[str, float]:
    """Return how long processes wait for one another, if the command line says so: the config comes after that."""
    key, limit = "resilience.timeout_s=", {}
    for word in words:
        if word.startswith(key):
            with contextlib.suppress(ValueError):  # refused when the config is checked
                limit = {"timeout_s": max(float(word.removeprefix(key)), JOINING_LEAST_S)}
    return limit


def _log_of(cfg: Config, rank: int) -> str:
    """Say where the error of the process `rank` can be read."""
    from megatrain.train.files import run_directory

    log = run_directory(cfg) / "logs" / f"rank-{rank}.log"
    return f"see {log}" if rank and log.exists() else "its message is above"


def _processes_needed(cfg: Config) -> int:
    """Return the number of processes of the layout on this machine; `parallel.dp_shard=-1` uses all its GPUs.

    Raises:
        UserError: this machine has too few GPUs, or cores.
    """
    if world_size(cfg.parallel) == 1:
        return 1
    import torch  # slow to import, and not needed for one process

    needed = world_size(fill(cfg.parallel, torch.cuda.device_count() or 1))
    if not is_started():
        require_room(layout_summary(cfg.parallel), needed)
    return needed


def require_room(layout: str, needed: int) -> None:
    """Check that this machine has the GPUs, or without any the cores, for the processes that a layout needs.

    Raises:
        UserError: it has too few.
    """
    import torch  # slow to import

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    advice = "Use smaller degrees, or several machines: torchrun --nnodes ... -m megatrain ..."
    if not gpus and needed > PROCESSES_PER_CORE * cores:
        raise UserError(
            f"The layout ({layout}) needs {needed} processes, but this machine has {cores} cores. {advice}"
        )
    if 0 < gpus < needed:
        raise UserError(
            f"The layout ({layout}) needs {needed} GPUs, but this machine has only {gpus}. {advice}"
        )
