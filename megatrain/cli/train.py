"""`megatrain train`."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatrain.cli.closing import close
from megatrain.cli.job import run_in_layout
from megatrain.observe.figures import unbreakable_output
from megatrain.resilience.signals import StopSignals
from megatrain.runtime.guarded import guarded
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config

if TYPE_CHECKING:
    from megatrain.evaluate.schedule import ScheduledTasks


def run(argv: list[str]) -> int:
    """Compose and check the config, train, and show the result; return the exit code."""
    with StopSignals() as signals:
        return run_in_layout("train", argv, argv, partial(train, "train", argv, signals))


def _tasks(cfg: Config, processes: Processes) -> "ScheduledTasks | None":
    if not cfg.tasks.are_any:
        return None
    with processes.at_work():
        from megatrain.evaluate.schedule import ScheduledTasks

    return processes.agree(lambda: ScheduledTasks(cfg.tasks))


def train(verb: str, argv: Sequence[str], signals: StopSignals, cfg: Config, processes: Processes) -> int:
    """Train as `cfg` says, and show the result of `megatrain VERB ARGV`; return the exit code."""
    with processes.at_work():  # on a busy machine this takes long, and not for all processes alike
        from megatrain.observe.report.page import REPORT_FILE
        from megatrain.train.failures import DivergedError
        from megatrain.train.files import run_directory
        from megatrain.train.main import run as do_train  # imports torch, so only once the config is valid

    try:
        with guarded(processes, timeout_s=cfg.resilience.timeout_s) as team:
            done = do_train(cfg, team, signals, tasks=_tasks(cfg, team))
    except DivergedError as error:
        if processes.is_first:
            page = run_directory(cfg) / REPORT_FILE
            curves = f" Its curves are in {page}." if page.exists() else ""
            print(f"megatrain: {error}{curves}", file=sys.stderr)
        return 1
    if cfg.log.display != "off" and processes.is_first:
        with unbreakable_output():  # the run is done and saved, whether or not anyone reads this
            close(cfg, done, verb, argv)
            sys.stdout.flush()
    return done.exit_code
