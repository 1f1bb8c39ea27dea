"""Comparison of two runs: config, data, the recorded steps, and the tensors of the newest checkpoint that both have.

A layout is no difference, and neither is any other key that changes no result (`resume.FREE`).
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.checkpoint.compare import Comparison, close, compare
from megatrain.checkpoint.errors import CorruptCheckpointError
from megatrain.checkpoint.inspect import Progress, open_checkpoint, require_whole
from megatrain.checkpoint.listing import CHECKPOINTS
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.retention import committed_steps, step_name
from megatrain.config.errors import UserError
from megatrain.config.load import flatten
from megatrain.train.files import read_config
from megatrain.train.resume import changed_keys

METRICS_FILE = "metrics.jsonl"
FINGERPRINTS_FILE = "fingerprints.jsonl"
QUANTITIES = (
    "data/sample_digest",
    "train/tokens",
    "train/lr",
    "train/loss",
    "train/grad_norm",
    "eval/loss",
)
"""Keys of metrics.jsonl that are compared, in the order in which a step computes them."""
BEFORE_GRADIENTS = QUANTITIES.index("train/grad_norm")
Pair = tuple[Any, Any]
Rows = dict[int, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Parting:
    """The first place at which a quantity differs, and its values there."""

    step: int
    quantity: str
    a: Any
    b: Any


@dataclass(slots=True)
class RunDifference:
    """Result of comparing two runs; `rtol` is the relative difference of numbers that is ignored."""

    a: Path
    b: Path
    rtol: float
    config: dict[str, Pair] = field(default_factory=dict)
    """Config keys that change results and differ; None where one run's kind of section lacks the key."""
    free: dict[str, Pair] = field(default_factory=dict)
    """Other config keys that differ: the layout, the run's name, ..."""
    data: Pair | None = None
    """The data fingerprints, if they differ."""
    steps: int = 0
    """Steps recorded by both."""
    last_steps: tuple[int | None, int | None] = (None, None)
    """Last step that each run recorded."""
    partings: list[Parting] = field(default_factory=list)
    """First difference of each quantity, earliest first."""
    checkpoint: int | None = None
    """Step of the newest checkpoint that both have, if its tensors were compared."""
    tensors: Comparison | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs that changes results; what only one run has recorded does not count."""
        tensors_differ = self.tensors is not None and not self.tensors.equal
        return not (self.config or self.data or self.partings or tensors_differ)

    @property
    def first(self) -> Parting | None:
        """Where the runs part: in the record, or else in a tensor of the checkpoint."""
        if self.partings:
            return self.partings[0]
        if self.tensors is None or self.tensors.equal:
            return None
        assert self.checkpoint is not None
        return Parting(self.checkpoint, *_first_of(self.tensors))


def compare_runs(a: Path, b: Path, *, rtol: float, with_tensors: bool, progress: Progress) -> RunDifference:
    """Compare two run directories, which may be training at this moment.

    Raises:
        UserError: one is no run directory, or can't be read.
        DamagedCheckpointError: a checkpoint that is to be compared is damaged.
    """
    found = RunDifference(a, b, rtol)
    configs = read_config(a), read_config(b)
    found.config = changed_keys(*configs)
    ours, theirs = (flatten(each) for each in configs)
    for key in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(key), theirs.get(key)
        if pair[0] != pair[1] and key not in found.config:
            found.free[key] = pair
    fingerprints = _data_fingerprint(a), _data_fingerprint(b)
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        found.data = fingerprints
    rows = _with_fingerprints(a), _with_fingerprints(b)
    common = sorted(rows[0].keys() & rows[1].keys())
    found.steps = len(common)
    found.last_steps = (max(rows[0], default=None), max(rows[1], default=None))
    found.partings = list(_partings(*rows, common, rtol))
    if with_tensors:
        _compare_newest(found, progress)
    return found


def _with_fingerprints(run: Path) -> Rows:
    """Return the compared quantities of each step, those of fingerprints.jsonl by kind and part of the model."""
    rows = read_rows(run / METRICS_FILE)
    for step, row in read_rows(run / FINGERPRINTS_FILE, ("gradients", "weights")).items():
        if step in rows:
            rows[step] |= {f"{kind} of {part}": pair for kind in row for part, pair in row[kind].items()}
    return rows


def read_rows(path: Path, keys: tuple[str, ...] = QUANTITIES) -> Rows:
    """Return the values of `keys` at each recorded step; lines that are no rows, such as a torn one, are skipped.

    Raises:
        UserError: the file can't be read.
    """
    rows: Rows = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        rows[row["step"]] = {key: row[key] for key in keys if key in row}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    return rows


def _partings(a: Rows, b: Rows, steps: list[int], rtol: float) -> Iterator[Parting]:
    """Yield the first difference of each quantity, by step, and within a step in the order in which it is computed."""
    parts = dict.fromkeys(key for step in steps for key in a[step] if key not in QUANTITIES)
    gradients = [key for key in parts if key.startswith("gradients")]
    weights = [key for key in parts if not key.startswith("gradients")]
    first, (norm, *last) = QUANTITIES[:BEFORE_GRADIENTS], QUANTITIES[BEFORE_GRADIENTS:]
    left = [*first, *gradients, norm, *weights, *last]
    for step in steps:
        for key in tuple(left):
            ours, theirs = a[step], b[step]
            if key in ours and key in theirs and not _alike(ours[key], theirs[key], rtol):
                left.remove(key)
                yield Parting(step, key, ours[key], theirs[key])


def _alike(a: Any, b: Any, rtol: float) -> bool:
    """Compare two values; a fingerprint's projection may differ by `rtol` of its norm, since its terms cancel."""
    if isinstance(a, list) and isinstance(b, list) and rtol > 0:
        (norm, projection), (other_norm, other) = a, b
        return close(norm, other_norm, rtol) and abs(projection - other) <= rtol * max(norm, other_norm)
    return close(a, b, rtol)


def _data_fingerprint(run: Path) -> Any:
    """Return what the newest readable manifest of a run says; None if there is none."""
    directory = run / CHECKPOINTS
    for step in reversed(committed_steps(directory)):
        with suppress(CorruptCheckpointError, UserError, OSError):
            return read_manifest(directory / step_name(step)).info.get("data_fingerprint")
    return None


def _compare_newest(found: RunDifference, progress: Progress) -> None:
    """Compare the tensors of the newest step that both runs have saved, after their hashes were checked."""
    directories = [run / CHECKPOINTS for run in (found.a, found.b)]
    common = set(committed_steps(directories[0])) & set(committed_steps(directories[1]))
    if not common:
        return
    found.checkpoint = max(common)
    paths = [directory / step_name(found.checkpoint) for directory in directories]
    for path in paths:
        require_whole(path, progress=progress)
    a, b = (open_checkpoint(path) for path in paths)
    found.tensors = compare(a, b, progress=progress, rtol=found.rtol)


def _first_of(found: Comparison) -> tuple[str, Any, Any]:
    """Return the name and both values of the first tensor or part of the state that differs."""
    if found.differences:
        difference = found.differences[0]
        if difference.first is None:
            return difference.name, *difference.dtype.split("/")  # type: ignore[return-value]
        index = ", ".join(map(str, difference.first.index))
        return f"{difference.name}[{index}]", difference.first.a, difference.first.b
    if found.reshaped:
        name, (ours, theirs) = next(iter(found.reshaped.items()))
        return name, ours, theirs
    if found.only_a or found.only_b:
        name = (found.only_a or found.only_b)[0]
        return name, *(("present", "absent") if found.only_a else ("absent", "present"))
    key, (ours, theirs) = next(iter(found.state.items()))
    return f"state.json {key}", ours, theirs
