"""`megatrain verify`: compare the results of parallel layouts with those of a single process."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatrain.cli.compose import Source, compose
from megatrain.cli.job import run_job
from megatrain.cli.options import Options, Parser, parse_options
from megatrain.cli.verify_table import Table, as_json
from megatrain.config.errors import UserError
from megatrain.config.nearest import nearest
from megatrain.config.schema import ConfigError
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.layout import world_size
from megatrain.train.candidates import LISTS, PROCESSES, Candidate, candidates
from megatrain.train.config import Config
from megatrain.train.faults import FAULTS

STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of this verb."""

    fault: str | None
    layouts: str
    processes: int
    json: str | None

    @property
    def faults(self) -> list[str]:
        """The faults to plant."""
        if self.fault is None:
            return []
        return list(FAULTS) if self.fault == "all" else [self.fault]


def run(argv: list[str]) -> int:
    """Compare the layouts of the config that the command line describes; return the exit code.

    0: all are equal, and every planted fault was caught in every layout that it can reach; 1: not so, or a layout that
    was asked for was not tried.

    Raises:
        UserError: the config, a flag or a file of layouts is wrong; nothing was started.
    """
    flags, rest = _take_flags(argv)
    options = parse_options("verify", rest)
    if options.multirun and len(rest) < len(argv):
        raise UserError("verify: --multirun combines with keys of the config only, not with flags of verify.")
    return run_job("verify", rest, partial(_verify, flags=flags, options=options))


def _take_flags(argv: list[str]) -> tuple[Flags, list[str]]:
    """Return this verb's flags and the other arguments.

    Raises:
        UserError: a flag lacks its value, or has a wrong one.
    """
    parser = Parser("verify")
    parser.add_argument("--fault")
    parser.add_argument("--layouts", default="all")
    parser.add_argument("--processes", default=str(PROCESSES))
    parser.add_argument("--json")
    found, rest = parser.parse_known_args(argv)
    if found.fault not in (None, "all", *FAULTS):
        near = nearest(found.fault, FAULTS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"--fault {found.fault}: must be all or one of {', '.join(FAULTS)}.{hint}")
    if not found.processes.isdecimal() or int(found.processes) < 2:
        raise UserError(f"--processes {found.processes}: must be an integer of at least 2")
    if found.json not in (None, STDOUT):
        _require_writable(Path(found.json))
    return Flags(found.fault, found.layouts, int(found.processes), found.json), rest


def _require_writable(path: Path) -> None:
    """Refuse a file that the results can't be written to.

    Raises:
        UserError: it is a directory, or its directory does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise UserError(f"--json {path}: must be a file, or - for standard output; {what}")


def _verify(cfg: Config, flags: Flags, options: Options) -> int:
    tried = _candidates(cfg, flags, options)
    _require_reach(cfg, flags, tried)
    # Imports torch, so only once everything is valid.
    from megatrain.train.verify import Check

    began = time.monotonic()
    with redirect_stdout(sys.stderr if flags.json == STDOUT else sys.stdout):
        check = Check(cfg, tried, flags.faults)
        table = Table(check)
        check.progress = table.progress
        found = []
        try:
            table.begin()
            for verdict in check.verdicts():
                table.row(verdict)
                found.append(verdict)
        finally:
            table.clear()
        code = int(any(each.counts_against for each in found))
        seconds = time.monotonic() - began
        table.end(found, seconds)
    if flags.json is not None:
        text = as_json(check, found, exit_code=code, seconds=seconds)
        if flags.json == STDOUT:
            print(text)
        else:
            Path(flags.json).write_text(text + "\n", encoding="utf-8")
    return code


def _candidates(cfg: Config, flags: Flags, options: Options) -> list[Candidate]:
    """Return the layouts of the command line, and those of --layouts.

    Raises:
        UserError: there are none, or the file of layouts is wrong.
    """
    asked = [cfg.parallel] if world_size(cfg.parallel) != 1 else []  # of unknown size: -1
    if flags.layouts in LISTS:
        if flags.layouts == "mine" and not asked:
            raise UserError(
                "--layouts mine: the config is one process; set a degree, such as parallel.tp=2, or choose another "
                "list: all, axes, or a file of layouts."
            )
        return candidates(asked, flags.layouts, cfg, flags.processes)
    asked += _layouts_of(Path(flags.layouts), options)
    return candidates(asked, "mine", cfg, flags.processes)


def _layouts_of(path: Path, options: Options) -> list[ParallelConfig]:
    """Return the layouts of a file: a line for each, of overrides that are added to those of the command line.

    Raises:
        UserError: it can't be read, has no layout, or has wrong lines, all of which are named.
    """
    if not path.exists():
        raise UserError(
            f"--layouts {path}: must be one of {', '.join(LISTS)}, or a file of layouts; there is no such file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--layouts {path}: can't be read: {reason}") from None
    found: list[ParallelConfig] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if problems := list(_problems_of(words, options, found)):
            wrong.append("\n    ".join([f"line {number}: {line.strip()}", *problems]))
    if wrong:
        raise UserError("\n  ".join([f"--layouts {path}: these lines are wrong:", *wrong]))
    if not found:
        raise UserError(
            f"--layouts {path}: has no layouts; write one a line, as in parallel.tp=2 parallel.dp_shard=2 (# begins a "
            "comment)"
        )
    return found


def _problems_of(words: Sequence[str], options: Options, found: list[ParallelConfig]) -> Iterator[str]:
    """Yield what is wrong with the overrides of one line, or add their layout to `found`."""
    others = [word for word in words if not word.startswith("parallel.")]
    if others:
        yield f"{' '.join(others)}: a layout has keys of parallel only, as in parallel.tp=2"
        return
    try:
        cfg = compose([*options.overrides, *words], Source(options.config_dir, options.config_name))
    except ConfigError as error:
        yield from map(str, error.problems)
    except UserError as error:
        yield str(error)
    else:
        if world_size(cfg.parallel) == 1:
            yield "is one process; set a degree, such as parallel.tp=2"
        else:
            found.append(cfg.parallel)


def _require_reach(cfg: Config, flags: Flags, tried: Sequence[Candidate]) -> None:
    """Refuse a fault that can reach none of the layouts: nothing could be said about it.

    Raises:
        UserError: there is one, and it was asked for by name.
    """
    if flags.fault is None or flags.fault == "all":
        return
    fault = FAULTS[flags.fault]
    if not any(fault.reaches(cfg.model, each.layout) for each in tried if not each.reason):
        raise UserError(
            f"--fault {flags.fault}: can reach none of the layouts, since it needs {fault.rule}; choose other layouts "
            "(parallel.*, --layouts) or another model."
        )
