"""One process at a time writes into a run directory, whatever has happened to the lock."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.config.errors import UserError
from megatrain.runtime.ownership import OWNER_FILE, Ownership, StaleOwnerError, read_owner, take


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_an_owner_keeps_what_it_took(tmp_path: Path, held: contextlib.ExitStack) -> None:
    ownership = take(tmp_path, held)
    ownership.require()
    found = read_owner(tmp_path)
    assert found == ownership.owner
    assert (found.token, found.pid) == (1, os.getpid())


def test_a_second_process_is_refused_and_told_who_holds_it(
    tmp_path: Path, held: contextlib.ExitStack
) -> None:
    take(tmp_path, held)
    with contextlib.ExitStack() as other, pytest.raises(UserError, match=rf"process {os.getpid()} on "):
        take(tmp_path, other)


def test_after_the_owner_has_left_the_next_one_counts_on(tmp_path: Path) -> None:
    for token in (1, 2, 3):
        with contextlib.ExitStack() as stack:
            assert take(tmp_path, stack).owner.token == token


def assert_stale(ownership: Ownership, words: str) -> None:
    with pytest.raises(StaleOwnerError, match=words) as caught:
        ownership.require()
    assert caught.value.exit_code == 2


def test_a_directory_that_was_removed_and_made_again_is_another_ones(
    tmp_path: Path, held: contextlib.ExitStack
) -> None:
    """The lock of the first one is on a file that no name leads to any more; both believe that they hold it."""
    run = tmp_path / "run"
    run.mkdir()
    first = take(run, held)
    shutil.rmtree(run)
    assert_stale(first, "was removed")
    run.mkdir()
    second = take(run, held)
    second.require()
    assert_stale(first, rf"belongs to process {os.getpid()} on .* since .* now")


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_last_one_that_started_owns_it(
    tmp_path: Path, held: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a parallel file system without flock, from two hosts."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = take(tmp_path, held)
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    second = take(tmp_path, held)
    second.require()
    assert second.owner.token == 2
    assert_stale(first, "on elsewhere")


def test_without_locks_a_living_process_of_this_host_is_respected(
    tmp_path: Path, held: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    take(tmp_path, held)
    facts = json.loads((tmp_path / OWNER_FILE).read_text())
    (tmp_path / OWNER_FILE).write_text(json.dumps(facts | {"pid": os.getppid()}))
    with pytest.raises(UserError, match=rf"process {os.getppid()}"):
        take(tmp_path, held)


def test_the_job_is_named(
    tmp_path: Path, held: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert "job 4711" in str(take(tmp_path, held).owner)
