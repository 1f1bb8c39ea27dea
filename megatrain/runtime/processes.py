"""The processes of a run: the rank of this one, and how all agree before something is written or abandoned.

torchrun, a scheduler or `megatrain` itself starts them and says so in the environment (RANK, WORLD_SIZE, LOCAL_RANK).
A run of one process needs none of that, nor torch (`runtime/group.py`).
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatrain.config.errors import UserError

T = TypeVar("T")
MEETING = "MEGATRAIN_MEETING"
"""Environment variable: the file over which processes that `megatrain` started find each other."""
VERDICT = "-verdict"
"""What follows the name of that file in the name of the file that says why they were ended."""


PROMISED = "MEGATRAIN_EXPECT_WORLD"
"""Environment variable: the number of processes that a launch script has promised to each of them."""


EXIT_FILE = "MEGATRAIN_EXIT_FILE"
"""Environment variable: a file in which the first process leaves its exit code when the user must mend something. A run
that has not begun has no other record, and the exit code of torchrun is always 1."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: the only one, unless it is a `runtime.group.JoinedProcesses`.

    All of them must call each method, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_size: int = 1
    group: Any = None
    """The torch process group of all processes."""

    @property
    def is_first(self) -> bool:
        """The one that talks to the user and writes the run's files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        return [value]

    def report(self) -> None:
        """Tell processes that wait for this one that it is at work, so that they go on waiting."""

    def doing(self, phase: str, step: int = -1) -> None:
        """Note what this process does from now on, for those that may have to say where it stands still."""

    def explain(self, error: BaseException) -> BaseException:
        """Return what is behind `error`: the failure or silence of another process, if it is that."""
        return error

    def notices(self) -> list[dict[str, Any]]:
        """Return what was found about the processes since the last call: a `notice`, and its facts."""
        return []

    def describe(self, **facts: Any) -> None:
        """Tell what a report on hangs needs: the run's `directory`, this rank's pipeline `stage`, `axes` of groups."""

    def at_work(self) -> AbstractContextManager[None]:
        """Report by itself, in the `with` block, as long as this process computes."""
        return nullcontext()

    def beside(self, name: str) -> "Processes":
        """Return the same processes over a new group, for a thread whose collectives must not meet those of others.

        Args:
            name: of the thread's meetings; each name is used once in a run.
        """
        return self

    def limit_waits(self, timeout_s: float) -> None:
        """Let no process wait longer for another one, in any group that there is now."""

    def agree(self, work: Callable[[], T]) -> T:
        """Run `work()` on every process, which may take as long as it computes; if it fails on one, all raise.

        Each raises its own error, or that of the first rank that failed.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            with self.at_work():
                result = work()
        except Exception as raised:
            error = raised
        errors = [each for each in self.gather(error and _portable(error)) if each is not None]
        if error is not None:
            raise error
        if errors:
            raise errors[0]
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], T]) -> T:
        """Return what `work()` returns or raises on the first process; the others do not call it."""
        found: list[T | None] = self.gather(self.agree(work if self.is_first else _nothing))
        return found[0]  # type: ignore[return-value]


def _nothing() -> None:
    return None


def _portable(error: Exception) -> Exception:
    """Return `error`, or an error with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return UserError(text) if isinstance(error, UserError) else RuntimeError(text)
    return error


def is_started() -> bool:
    """Return whether a launcher started this process as one of a number that it chose."""
    return "WORLD_SIZE" in os.environ


def require_promised_size() -> None:
    """Refuse to run among another number of processes than the launch script has promised.

    torchrun can form a smaller group than it was asked for, where the clocks of two hosts differ.

    Raises:
        UserError: there are more or fewer of them.
    """
    promised, found = os.environ.get(PROMISED), os.environ.get("WORLD_SIZE", "1")
    if promised not in (None, "", found):
        raise UserError(
            f"{promised} processes were promised ({PROMISED}), but {found} {'has' if found == '1' else 'have'} come "
            "together: a node is missing, or started alone. Nothing was trained; see what the other nodes say."
        )


@contextlib.contextmanager
def telling_launcher() -> Iterator[None]:
    """Leave the exit code of a `UserError` in the block for the launch script, which then does not try again."""
    try:
        yield
    except UserError as error:
        path = os.environ.get(EXIT_FILE)
        if path and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                Path(path).write_text(f"{error.exit_code}\n")
        raise


def redirect_output(path: Path) -> None:
    """Append what this process prints to `path`, which explains itself when it is the one that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
