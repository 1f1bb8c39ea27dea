"""How the processes of a run find each other, with a word about who is missing while they wait."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from torch import distributed as dist

from megatrain.config.errors import StalledError, UserError
from megatrain.runtime.processes import MEETING

FIRST_WORD_S = 5.0
NEXT_WORDS_S = 60.0
"""When the missing are named for the first time, and how often after that."""
PART_S = 2.0
"""Waits are cut into such parts, since signals are heard between them only."""
SHOWN = 16
"""Ranks that a message names at most."""
LOOPBACK = "127.0.0.1"


def meet(rank: int, size: int, *, timeout_s: float) -> tuple[dist.Store, str]:
    """Return the store of all processes once each of them has come to it, and the address at which rank 0 is reached.

    Raises:
        UserError: the address is incomplete, or its port is taken.
        StalledError: somebody has not come in time.
    """
    words = Words(speaks=os.environ.get("LOCAL_RANK", "0") == "0", timeout_s=timeout_s)
    meeting = os.environ.get(MEETING)
    store, address = (
        (dist.FileStore(meeting, size), LOOPBACK) if meeting else _store_at_address(rank, size, words)
    )
    store = dist.PrefixStore(f"megatrain {_job(size)} {size}", store)
    _call_roll(store, rank, size, words)
    return store, address


def told(store: dist.Store, key: str, *, timeout_s: float) -> bytes:
    """Return what rank 0 sets as `key`; signals are heard meanwhile, which `store.get` would not.

    Raises:
        StalledError: it does not come in time.
    """
    words = Words(speaks=False, timeout_s=timeout_s)
    while not _is_set(store, key):
        words.waiting(partial(str, f"this process has waited for rank 0 to tell '{key}'"))
    value: bytes = store.get(key)
    return value


def _job(size: int) -> str:
    """Return what tells this job's keys from those of another job, or an earlier attempt, at the same store.

    torchrun counts restarts on each machine by itself, so the count is the same everywhere on a single machine only.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID", "")
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    return f"{job} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '') if is_alone else ''}"


class Words:
    """What is said on standard error while this process waits, by the first one of each machine."""

    def __init__(self, *, speaks: bool, timeout_s: float) -> None:
        self._speaks = speaks
        self.timeout_s = timeout_s
        self._began = time.monotonic()
        self._next = FIRST_WORD_S

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return max(self.timeout_s - (time.monotonic() - self._began), 0.0)

    def waiting(self, what: Callable[[], str]) -> None:
        """Say what is waited for, if it is time to.

        Raises:
            StalledError: the time is over.
        """
        waited = time.monotonic() - self._began
        if waited >= self.timeout_s:
            raise StalledError(
                f"{what()} for {waited:.0f} s, which is the limit (resilience.timeout_s). Look whether all "
                "machines were started, with the same address and port of rank 0 and the same number of processes."
            )
        if self._speaks and waited >= self._next:
            self._next += NEXT_WORDS_S
            print(f"megatrain: {what()} for {waited:.0f} s", file=sys.stderr, flush=True)


def _store_at_address(rank: int, size: int, words: Words) -> tuple[dist.Store, str]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"WORLD_SIZE={size} is set, but MASTER_ADDR='{host}' and MASTER_PORT='{port}' are not the address and the "
            "port of rank 0. Start with torchrun, or set both."
        )
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun has its own
    if not is_host:
        _await_host(host, int(port), rank, words)
    try:
        store = dist.TCPStore(
            host,
            int(port),
            size,
            is_host,
            timedelta(seconds=max(words.left_s, 1.0)),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(
                f"Port {port} of this machine ({socket.gethostname()}), at which the processes are to meet, is taken: "
                f"by an earlier run that has not ended yet (see `ss -ltnp 'sport = {port}'`), or another program. "
                "End it, or choose another port: MASTER_PORT=..., torchrun --master-port=..."
            ) from None
        raise
    return store, host


def _await_host(host: str, port: int, rank: int, words: Words) -> None:
    """Wait until rank 0 listens."""
    while (reason := _unreachable(host, port)) is not None:
        waits = f"rank {rank} ({socket.gethostname()}) has waited for rank 0 at {host}:{port} ({reason})"
        words.waiting(partial(str, waits))
        time.sleep(0.2)


def _unreachable(host: str, port: int) -> str | None:
    """Return why nobody can be reached there; None: somebody can."""
    try:
        socket.create_connection((host, port), timeout=PART_S).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _call_roll(store: dist.Store, rank: int, size: int, words: Words) -> None:
    """Wait until all have come; the first one says who has not."""
    store.set(f"here {rank}", socket.gethostname())
    if store.add("number", 1) >= size:
        store.set("all", "")

    def missing() -> str:
        if rank and store.check(["here 0"]):
            return (
                f"rank {rank} of {size} ({socket.gethostname()}) has waited for others, which rank 0 names,"
            )
        absent = [each for each in range(size) if not store.check([f"here {each}"])]
        present = sorted({store.get(f"here {each}").decode() for each in range(size) if each not in absent})
        shown = ", ".join(map(str, absent[:SHOWN])) + (", ..." if len(absent) > SHOWN else "")
        hosts = ", ".join(present[:SHOWN]) + (", ..." if len(present) > SHOWN else "")
        return f"{len(absent)} of {size} processes have not come (ranks {shown}; here: {hosts})"

    while not _is_set(store, "all"):
        if rank == 0 or not store.check(["here 0"]) or words.left_s <= 0:
            words.waiting(missing)


def _is_set(store: dist.Store, key: str) -> bool:
    with contextlib.suppress(RuntimeError):
        store.wait([key], timedelta(seconds=PART_S))
        return True
    return False
