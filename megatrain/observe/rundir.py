"""The run's own record: what was measured at each step, what happened, and how it stands.

metrics.jsonl has one row per step, fingerprints.jsonl too if asked for, events.jsonl one per event; status.json tells
the state.

A failure to write does not end a run: it is reported once, on standard error, and training continues. What does end it
is another owner of the run directory. A number that JSON does not have (nan, inf) is written as null.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.runtime.ownership import StaleOwnerError


class RunLog:
    """The three files of one run directory, which exists."""

    def __init__(
        self, directory: Path, run_id: str = "", require_owner: Callable[[], None] = lambda: None
    ) -> None:
        """Continue the files in `directory`.

        Args:
            run_id: identity of the run, in every row and event.
            require_owner: called immediately before each write; raises if the directory belongs to another process.
        """
        self.directory = directory
        self.run_id = run_id
        self._whose = {"run_id": run_id} if run_id else {}
        self._require_owner = require_owner
        self._is_stale = False
        self.first_step = 0
        """Steps that were done when this attempt began."""
        self.lost: dict[str, float] = {"steps": 0, "seconds": 0.0}
        """Recorded steps that `open` has dropped, since they are done again, and the time that they took."""
        self._metrics = directory / "metrics.jsonl"
        self._fingerprints = directory / "fingerprints.jsonl"
        self._events = directory / "events.jsonl"
        self._status = directory / "status.json"
        self._attempt = _read_attempt(self._status) + 1
        self._warned = False

    def open(self, step: int, *, owes_row: bool = False) -> None:
        """Keep the rows up to `step` only: what a killed process did after its last checkpoint is done again.

        With `owes_row` that of `step` itself is dropped as well, and will be written once more.

        Lines that a kill or a full disk left torn are dropped, from the events too.
        """
        self.first_step = step
        self.lost = _lost(self._metrics, step)

        def rewrite(path: Path, last: int) -> None:
            _rewrite(path, keep=lambda row: step > 0 and row.get("step", 0) <= last)

        self._attempted(partial(rewrite, self._metrics, step - owes_row))
        self._attempted(partial(rewrite, self._fingerprints, step))
        self._attempted(lambda: _rewrite(self._events, keep=lambda row: True))

    def recorded(self, step: int) -> dict[str, Any]:
        """Return the row of `step` in metrics.jsonl; empty if there is none."""
        with contextlib.suppress(OSError), self._metrics.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and row.get("step") == step:
                        return row
        return {}

    def row(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        self._attempted(lambda: _append(self._metrics, {**row, "attempt": self._attempt, **self._whose}))

    def fingerprints(self, row: dict[str, Any]) -> None:
        """Append one row to fingerprints.jsonl."""
        self._attempted(lambda: _append(self._fingerprints, row | self._whose))

    def event(self, event: str, **facts: Any) -> None:
        """Append one event, with the time, to events.jsonl."""
        stamped = {"time": _now(), "event": event, "attempt": self._attempt, **self._whose, **facts}
        self._attempted(lambda: _append(self._events, stamped))

    def status(self, state: str, *, step: int, reason: str, exit_code: int | None = None) -> None:
        """Replace status.json: state is running, done, stopped or failed."""
        facts = {
            "state": state,
            "step": step,
            "reason": reason,
            "exit_code": exit_code,
            "attempt": self._attempt,
            **self._whose,
            "pid": os.getpid(),
            "time": _now(),
        }
        self._attempted(lambda: _replace(self._status, [json.dumps(facts, indent=1) + "\n"]))

    def _attempted(self, write: Callable[[], None]) -> None:
        if self._is_stale:
            return
        try:
            self._require_owner()
            write()
        except StaleOwnerError:
            self._is_stale = True
            raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                with contextlib.suppress(OSError, ValueError):  # standard error may be gone as well
                    print(
                        f"megatrain: the run's log can't be written, training continues: {error}",
                        file=sys.stderr,
                    )


class NoLog(RunLog):
    """A log that writes nothing, for processes other than the first."""

    def _attempted(self, write: Callable[[], None]) -> None:
        pass


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(row: dict[str, Any]) -> str:
    """Return the row as one line of strict JSON, ASCII only."""
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Replace what JSON lacks: numbers of other libraries by Python's, nan and inf by null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add one line, or nothing: half a line (the disk is full) is taken back."""
    line = _line(row).encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(f"only a part of a line fitted into {path}")
        except OSError:
            file.truncate(end)
            raise


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Put `lines` in the place of `path`'s content: all or nothing, even if the machine stops."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not to be kept, and whatever is not a row; a file without such is left alone."""
    if not path.exists():
        return
    if any(row is None or not keep(row) or not line.endswith("\n") for line, row in _read(path)):
        _replace(
            path, (line.rstrip("\n") + "\n" for line, row in _read(path) if row is not None and keep(row))
        )


def _lost(path: Path, step: int) -> dict[str, float]:
    """Return how many rows lie after `step`, and the wall time from the last one before to the last of them."""
    kept, seconds, steps = 0.0, 0.0, 0
    if path.exists():
        for _, row in _read(path):
            elapsed = None if row is None else row.get("perf/elapsed_s")
            if row is None or not isinstance(elapsed, int | float):
                continue
            if row.get("step", 0) <= step:
                kept = elapsed
            else:
                steps += 1
                seconds = max(seconds, elapsed - kept if elapsed >= kept else elapsed)
    return {"steps": steps, "seconds": seconds}


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each line with its row, one at a time (the file of a long run is large); None for a torn one."""
    with path.open(errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield line, row if isinstance(row, dict) else None


def _read_attempt(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
