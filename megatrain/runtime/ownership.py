"""Who may write into a run directory: one process at a time, the one that took it last.

A process that starts locks the directory, where the file system has locks, and puts its name and a token into
`owner.json`. It reads that file again immediately before everything that it writes, and stops if it finds another
token: it has been stopped or cut off for long, and somebody else has started meanwhile. A lock alone does not tell: it
belongs to a file that may have been removed with its directory, and other hosts may not see it.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatrain.config.errors import UserError

OWNER_FILE = "owner.json"
LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class StaleOwnerError(UserError):
    """Another process owns the run directory now, or the directory is gone; this process must write nothing more."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that writes into a run directory."""

    token: int
    """Number of owners that the directory has had, this one included."""
    nonce: str
    """Drawn by the process: two directories of the same name count their owners apart."""
    host: str
    pid: int
    job: str | None
    """The scheduler's id of the job."""
    since: str

    def __str__(self) -> str:
        job = "" if self.job is None else f", job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class Ownership:
    """The right of this process to write into `directory`, until somebody else takes it."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        self.directory = directory
        self.owner = owner

    def require(self) -> None:
        """Check that this process still owns the directory; call this immediately before writing there.

        Raises:
            StaleOwnerError: it does not; the message names the present owner.
        """
        found = read_owner(self.directory)
        if found is None:
            raise StaleOwnerError(
                f"{self.directory} was removed, or its {OWNER_FILE}, while this run was training in it. Nothing more "
                "is written there. Start the command again: it makes a new run, unless the directory is restored first."
            )
        if found.nonce != self.owner.nonce:
            raise StaleOwnerError(
                f"{self.directory} belongs to {found} now (owner {found.token}; this process was owner "
                f"{self.owner.token}, since {self.owner.since}). Nothing more is written there by this one."
            )


def read_owner(directory: Path) -> Owner | None:
    """Return the present owner of a run directory; None if there was none, or the file is unreadable."""
    try:
        return Owner(**json.loads((directory / OWNER_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def take(directory: Path, stack: contextlib.ExitStack) -> Ownership:
    """Lock `directory` until `stack` is left, and become its owner.

    Raises:
        UserError: another process holds it; or it cannot be written.
    """
    try:
        _lock(directory, stack)
        before = read_owner(directory)
        owner = Owner(
            token=1 if before is None else before.token + 1,
            nonce=uuid.uuid4().hex,
            host=platform.node(),
            pid=os.getpid(),
            job=next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), None),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        partial = directory / f".{OWNER_FILE}-{owner.nonce}"
        with partial.open("w") as file:
            file.write(json.dumps(asdict(owner), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / OWNER_FILE)
    except OSError as error:
        raise UserError(f"{directory} can't be written: {error}") from None
    return Ownership(directory, owner)


def is_own(directory: Path) -> bool:
    """Tell whether this process is the present owner of a run directory."""
    owner = read_owner(directory)
    return owner is not None and (owner.host, owner.pid) == (platform.node(), os.getpid())


def is_locked(directory: Path) -> bool:
    """Tell whether a process holds the lock of a run directory."""
    with contextlib.suppress(OSError), (directory / LOCK_FILE).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    lock = stack.enter_context((directory / LOCK_FILE).open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        held = _lives_here(read_owner(directory))  # another host's is found out by its next write
    else:
        held = False
    if held:
        owner = read_owner(directory)
        whose = "" if owner is None else f" ({owner})"
        raise UserError(
            f"Another process is training in {directory}{whose}. Wait for it, stop it, or choose another run.name."
        )


def _lives_here(owner: Owner | None) -> bool:
    """Tell whether `owner` is a process of this host that still runs."""
    if owner is None or owner.host != platform.node() or owner.pid == os.getpid():
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
