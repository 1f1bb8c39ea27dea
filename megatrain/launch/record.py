"""A run's own record of how its last attempt went, `status.json`: what launchers decide by."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The content of `status.json`, as far as launchers need it."""

    state: str
    """running, done, stopped or failed."""
    step: int
    reason: str
    attempt: int
    exit_code: int | None
    """Exit code of the run; None while it runs."""

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.state}{why} at step {self.step}, attempt {self.attempt}"


def read_status(directory: Path) -> RunStatus | None:
    """Return the record of the run in `directory`; None if there is none, or it is unreadable."""
    try:
        data = json.loads((directory / "status.json").read_bytes())
        return RunStatus(
            state=str(data["state"]),
            step=int(data["step"]),
            reason=str(data["reason"]),
            attempt=int(data["attempt"]),
            exit_code=None if data["exit_code"] is None else int(data["exit_code"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
