"""The run's own record: metrics.jsonl (a row a step), events.jsonl (what happened) and status.json (how it stands).

Nothing here ends a run: a record that can't be written is said once, on standard error, and training goes on.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class RunLog:
    """The three files of one run directory, which exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metrics = directory / "metrics.jsonl"
        self._events = directory / "events.jsonl"
        self._status = directory / "status.json"
        self._attempt = _read_attempt(self._status) + 1
        self._warned = False

    def open(self, step: int) -> None:
        """Keep the rows up to `step` only: what a killed process did after its last checkpoint is done again.

        A last line that a killed process left torn is dropped, from the events too.
        """
        rows = [row for row in _read_rows(self._metrics) if row.get("step", 0) <= step]
        self._attempted(lambda: _rewrite(self._metrics, rows))
        self._attempted(lambda: _rewrite(self._events, _read_rows(self._events)))

    def row(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl; a value that is not finite becomes null."""
        self._attempted(lambda: _append(self._metrics, row))

    def event(self, event: str, **facts: Any) -> None:
        """Append one event, with the time, to events.jsonl."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._attempted(
            lambda: _append(self._events, {"time": now, "event": event, "attempt": self._attempt, **facts})
        )

    def status(self, state: str, *, step: int, reason: str, exit_code: int | None = None) -> None:
        """Replace status.json: state is running, done, stopped or failed."""
        facts = {
            "state": state,
            "step": step,
            "reason": reason,
            "exit_code": exit_code,
            "attempt": self._attempt,
            "pid": os.getpid(),
            "time": time.time(),
        }
        self._attempted(lambda: _replace(self._status, json.dumps(facts, indent=1) + "\n"))

    def _attempted(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                print(
                    f"megatrain: the run's log can't be written, training goes on: {error}", file=sys.stderr
                )
                self._warned = True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in row.items()}) + "\n"


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(_line(row))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(map(_line, rows))
    if not path.exists() or path.read_text() != text:
        _replace(path, text)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a torn line ends the file."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _read_attempt(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
