"""The rows of metrics.jsonl as arrays, for runs of up to millions of steps.

A file that is being written, or whose last line a kill left torn, is read as far as it goes.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 8 << 20
FAST_FROM = 1 << 20  # bytes; less is parsed in the time that importing Arrow takes
ABSENT = object()
Rows = list[dict[str, Any]]
Columns = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Metrics:
    """A run's numbers: `steps` `(rows,)` float64, rising, and for each key `columns` `(rows,)` float64.

    nan: the row lacks the key. inf: the value is not finite (metrics.jsonl has null there).
    """

    steps: np.ndarray
    columns: Columns
    torn: int
    """Lines that are no rows, such as the one that a killed process was writing."""

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that have a value of `key`, and the values; both are empty if there are none."""
        values = self.columns.get(key)
        if values is None:
            return np.empty(0), np.empty(0)
        present = ~np.isnan(values)
        return self.steps[present], values[present]


def read_metrics(path: Path) -> Metrics:
    """Read the rows of `path`, which may be absent.

    Where a resumed attempt did steps again, its rows replace those of that step and of all later ones, as in
    `RunLog.open`.

    Raises:
        OSError: the file can't be read.
    """
    parts: list[Columns] = []
    torn = 0
    for chunk in _chunks(path) if path.exists() else ():
        columns = _fast(chunk)
        if columns is None:
            rows = _rows(chunk)
            torn += sum(1 for line in chunk.splitlines() if line.strip()) - len(rows)
            columns = _columns(rows)
        if len(columns.get("step", ())):
            parts.append(columns)
    if not parts:
        return Metrics(np.empty(0), {}, torn)
    keys = dict.fromkeys(key for part in parts for key in part)
    whole = {
        key: np.concatenate([part.get(key, np.full(len(part["step"]), np.nan)) for part in parts])
        for key in keys
    }
    steps = whole.pop("step")
    kept = np.ones(len(steps), dtype=bool)
    kept[:-1] = steps[:-1] < np.minimum.accumulate(steps[::-1])[::-1][1:]
    return Metrics(steps[kept], {key: values[kept] for key, values in whole.items()}, torn)


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the file in pieces of whole lines; the last one may be torn."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk + file.readline()


def _fast(chunk: bytes) -> Columns | None:
    """Parse a chunk several times faster than `json` does; None if it has anything but complete rows of numbers.

    Arrow doesn't tell an absent key from null, so a chunk with null (or NaN) is left to `json`.
    """
    if len(chunk) < FAST_FROM or b"null" in chunk or b"NaN" in chunk:
        return None
    try:
        import pyarrow as pa
        import pyarrow.json as pj
    except ImportError:
        return None
    try:
        table = pj.read_json(io.BytesIO(chunk))
    except pa.ArrowInvalid:
        return None
    if "step" not in table.column_names or table.column("step").null_count:
        return None
    return {
        name: table.column(name).to_numpy().astype(np.float64)
        for name in table.column_names
        if pa.types.is_integer(table.column(name).type) or pa.types.is_floating(table.column(name).type)
    }


def _rows(chunk: bytes) -> Rows:
    rows = []
    for line in chunk.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return rows


def _columns(rows: Rows) -> Columns:
    """Return the numeric columns of `rows`."""
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if value is None or _is_number(value)
    )
    return {key: np.array([_number(row.get(key, ABSENT)) for row in rows], dtype=np.float64) for key in keys}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    """Return the value as a float: nan if it is absent or no number, inf if it is not finite."""
    if value is None:
        return math.inf
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.inf
    except OverflowError:
        return math.inf
