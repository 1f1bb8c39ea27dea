"""A run's own record, read from its directory: rows, events, status, config, versions. Nothing is written.

Everything but the rows is optional, and a part that can't be read is as if it were absent: a run that was killed, or
one of another version, still has a report.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain.config.errors import UserError
from megatrain.observe.report.metrics import Metrics, read_metrics

RECORD = ("metrics.jsonl", "events.jsonl", "status.json", "config.yaml")
"""Files of which a run directory has at least one."""
State = Literal["running", "interrupted", "finished", "stopped", "failed", "unknown"]
STATES: Mapping[str, State] = {"done": "finished", "stopped": "stopped", "failed": "failed"}

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """All that a run directory says about its run."""

    directory: Path
    name: str
    metrics: Metrics
    events: list[Event]
    status: dict[str, Any]
    config: dict[str, Any]
    """Dotted key -> value; empty if there is no readable config."""
    state: State
    checkpoints: list[str]
    """Names of the committed checkpoints that are left, oldest first."""

    @property
    def attempts(self) -> int:
        """Number of times that the run was started."""
        numbers = [each["attempt"] for each in self.events if isinstance(each.get("attempt"), int)]
        return max([1, *numbers])

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run by its config."""
        steps = self.config.get("train.steps")
        return steps if isinstance(steps, int) else None

    def last(self, event: str, key: str) -> Any:
        """Return the value of `key` in the last event of that name; None if there is none."""
        found = (each[key] for each in reversed(self.events) if each.get("event") == event and key in each)
        return next(found, None)


def read_record(directory: Path) -> Record:
    """Read the run in `directory`, which may be training at this moment.

    Raises:
        UserError: it is no run directory, or it has no row yet.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}: there is no such directory. Name a run directory, such as runs/default."
        )
    if not any((directory / name).exists() for name in RECORD):
        inner = sorted(path.parent.name for path in directory.glob("*/metrics.jsonl"))
        hint = f" It holds runs: {', '.join(str(directory / name) for name in inner[:3])}." if inner else ""
        raise UserError(f"{directory} is not a run directory: it has none of {', '.join(RECORD)}.{hint}")
    try:
        metrics = read_metrics(directory / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{directory / 'metrics.jsonl'} can't be read: {error.strerror or error}") from None
    if not len(metrics.steps):
        raise UserError(
            f"{directory} has no rows to show: metrics.jsonl is {'empty' if not metrics.torn else 'damaged'}, so no "
            "step of this run was recorded. Try again once the run has done a step."
        )
    config = _read_yaml(directory / "config.yaml")
    status = _read_json(directory / "status.json")
    return Record(
        directory=directory,
        name=str(config.get("run.name") or directory.resolve().name),
        metrics=metrics,
        events=list(_read_events(directory / "events.jsonl")),
        status=status,
        config=config,
        state=_state(directory, status),
        checkpoints=sorted(path.name for path in directory.glob("checkpoints/step-*") if path.is_dir()),
    )


def _state(directory: Path, status: dict[str, Any]) -> State:
    if status.get("state") == "running":
        return "running" if _is_locked(directory / ".lock") else "interrupted"
    return STATES.get(str(status.get("state")), "unknown")


def _is_locked(path: Path) -> bool:
    """Return whether a process is training in the directory: it holds a lock, which ends with the process."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return found if isinstance(found, dict) else {}
    return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    with contextlib.suppress(OSError, yaml.YAMLError, ValueError, RecursionError):
        return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")), ""))
    return {}


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested mappings under its dotted key."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def _read_events(path: Path) -> Iterator[Event]:
    """Yield the events in order, without torn lines."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event
