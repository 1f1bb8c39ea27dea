"""`--multirun`: run every combination of the swept values, each in a new process, one after another.

A new process keeps the process groups, CUDA contexts and random states of one job out of the next. All
jobs are composed and checked before the first one starts.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from megatrain.cli.compose import Source, compose, hydra_over, parse
from megatrain.cli.conf import group_options
from megatrain.config.errors import UserError
from megatrain.config.schema import ConfigError
from megatrain.runtime.launch import SAVED_BY_SIGNAL, passing_signals
from megatrain.train.config import Config
from megatrain.train.files import IMPORT_FILE, run_directory

NAME_LENGTH = 80
"""Maximum length in characters of the part of a run's name that comes from its overrides."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    overrides: list[str]
    cfg: Config


def plan_sweep(overrides: list[str], source: Source) -> list[Job]:
    """Return all jobs, composed and checked, in the order of Hydra's own sweeper (the last key varies fastest).

    Raises:
        UserError: names every problem of every job.
    """
    combinations, swept = expand(overrides, source)
    jobs: list[Job] = []
    mistakes: dict[str, list[str]] = {}
    for index, lines in enumerate(combinations):
        try:
            cfg = compose(lines, source)
            if "run.name" not in swept:
                if (run_directory(cfg) / IMPORT_FILE).is_file():
                    raise UserError(
                        f"run.name={cfg.run.name} is an imported run, and each job of a sweep is a run of its own: "
                        "import the model once for each job, and sweep over run.name"
                    )
                name = f"{cfg.run.name}/{index}-{_label(lines, swept)}"
                cfg = replace(cfg, run=replace(cfg.run, name=name))
                lines = [*lines, f"run.name='{name}'"]
            jobs.append(Job(lines, cfg))
        except ConfigError as error:
            for problem in error.problems:
                mistakes.setdefault(str(problem), []).append(str(index))
    if mistakes:
        found = [f"{text} (job {', '.join(indices)})" for text, indices in mistakes.items()]
        raise UserError("no job was started:\n  " + "\n  ".join(found))
    return jobs


def expand(overrides: list[str], source: Source) -> tuple[list[list[str]], list[str]]:
    """Return the overrides of every combination, and the keys that differ between them.

    Raises:
        UserError: an override is not one, or can't be swept.
    """
    with hydra_over(source):
        parsed, broken = parse(overrides, sweep=True)
        if broken:
            raise ConfigError(broken)
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        return _combinations(parsed, source), swept


def differing(lines: list[str], swept: list[str]) -> dict[str, str]:
    """Return the values of the keys in `swept` among the overrides `lines`."""
    pairs = [line.lstrip("+").partition("=") for line in lines]
    return {key: value for key, _, value in pairs if key in swept}


def short(differs: dict[str, str], separator: str = " ") -> str:
    """Return the values with the last part of each key, `lr=0.001 seed=1`."""
    return separator.join(f"{key.rpartition('.')[2]}={value}" for key, value in differs.items())


def run_sweep(verb: str, jobs: list[Job], source: Source) -> int:
    """Run the jobs one after another and print how each ended; 0 only if all ended with 0."""
    ended: list[tuple[int, float]] = []
    for index, job in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {job.cfg.run.name}", flush=True)
        start = time.monotonic()
        code = _run_process(job_command(verb, job.overrides, source))
        ended.append((code, time.monotonic() - start))
        if code in (SAVED_BY_SIGNAL, 130) or code < 0:
            break
    rows = [
        (str(code), f"{seconds:.1f}", *_figures(run_directory(job.cfg)), str(run_directory(job.cfg)))
        for job, (code, seconds) in zip(jobs, ended, strict=False)
    ]
    rows += [("-",) * 5 + (f"{run_directory(job.cfg)} (not started)",) for job in jobs[len(ended) :]]
    print("\n" + table(("exit", "seconds", "loss", "val. loss", "tokens/s", "run"), rows))
    return next((abs(code) for code, _ in ended if code), 0)


def job_command(verb: str, overrides: list[str], source: Source) -> list[str]:
    """Return the command line of one job."""
    flags = ["--config-name", source.config_name]
    flags += ["--config-dir", source.config_dir] if source.config_dir else []
    return [sys.executable, "-m", "megatrain", verb, *flags, *overrides]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under `head`: numbers to the right, the last column to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def _figures(directory: Path) -> tuple[str, str, str]:
    """Return the last loss, validation loss and tokens/s of a run, `-` where there is none."""
    last: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut short when the run was killed
                last |= json.loads(line)

    def shown(key: str, form: str) -> str:
        return f"{last[key]:{form}}" if last.get(key) is not None else "-"

    return shown("train/loss", ".4f"), shown("eval/loss", ".4f"), shown("perf/tokens_per_sec", ",.0f")


class _Options:
    """Source of a group's options for glob(): the config files, without their bases."""

    def __init__(self, source: Source) -> None:
        self.groups = group_options(source.config_dir)

    def get_group_options(self, group_name: str, results_filter: object = None) -> list[str]:
        """Return a group's options; name and parameters are Hydra's."""
        return self.groups.get(group_name, [])


def _combinations(parsed: list[Override], source: Source) -> list[list[str]]:
    for override in parsed:
        override.config_loader = _Options(source)
    try:
        return [list(lines) for lines in BasicSweeper.split_arguments(parsed, None)[0]]
    except HydraException as error:
        raise UserError(f"this sweep can't be run: {error}") from error


def _label(lines: list[str], swept: list[str]) -> str:
    """Return the part of a run's name that distinguishes the job: `lr=0.001,seed=1`."""
    text = short(differing(lines, swept), ",")
    return re.sub(r"[^A-Za-z0-9._=,-]+", "-", text).replace("..", ".")[:NAME_LENGTH].rstrip("-.,=") or "job"


def _run_process(command: list[str]) -> int:
    """Run one job in a new process and wait for it."""
    with subprocess.Popen(command) as child, passing_signals([child]):
        return child.wait()
