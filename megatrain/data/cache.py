"""The token caches of a directory: which there are, where each comes from, and which may go.

A process that reads a cache holds a shared lock on its index until it ends (`mark_used`), and one that builds holds the
lock file that `build_once` takes; `prune` removes nothing that is locked. Both locks end with their process, however
that ends. File systems without locks keep caches from being pruned, not from being read.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatrain.config.errors import UserError
from megatrain.data.store import DAMAGED_FILE, FORMAT_VERSION, INDEX_FILE, SOURCES_FILE, read_index
from megatrain.runtime.urls import is_url

USED_FILE = ".last-used"
DAY_S = 86400.0
_NAME = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.partial-([0-9a-f]{32}).*")
_held: dict[str, int] = {}

State = Literal["complete", "damaged", "other format", "unfinished"]
Sources = Literal["same", "changed", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class Cache:
    """One token cache, or what is left of one that was not finished."""

    name: str
    directory: Path
    state: State
    """`complete`; `damaged`: a file is missing or of the wrong size; `other format`: of another version of this
    program; `unfinished`: being built, or left by a builder that was killed."""
    origin: str
    """Where its text came from, as a person wrote it; empty if unknown."""
    tokens: int
    """Both splits together, end-of-text tokens included."""
    bytes: int
    """Size of all files."""
    created: float
    """Seconds since 1970."""
    last_used: float
    """Seconds since 1970."""
    sources: Sources
    """Whether the files it was made from are the same as then, changed (one was modified or removed), missing (all of
    them), or unknown."""
    in_use: bool
    """Whether a process reads or builds it now."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A cache that is not needed, why, and what kept it from being removed (None if it was, or would be)."""

    cache: Cache
    reason: str
    failure: str | None


def mark_used(directory: Path) -> None:
    """Keep `prune` from removing the cache `directory` until this process ends, and renew its date of last use.

    A directory that this user may not write to is read all the same: then only the date is not renewed.
    """
    with suppress(OSError):
        descriptor = os.open(directory / INDEX_FILE, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # others hold it for moments, or remove the cache
        except OSError:
            os.close(descriptor)
            raise
        previous = _held.pop(str(directory), None)  # of a cache that was built anew since
        _held[str(directory)] = descriptor
        if previous is not None:
            os.close(previous)
    with suppress(OSError):
        (directory / USED_FILE).touch()


def put_aside(directory: Path) -> None:
    """Mark the cache `directory` as damaged, so that the next run builds it again and `prune` removes it.

    Raises:
        UserError: the directory can't be written.
    """
    try:
        (directory / INDEX_FILE).rename(directory / DAMAGED_FILE)
    except FileNotFoundError:  # marked before, or without an index, which is damage as well
        return
    except OSError as error:
        raise UserError(
            f"{directory} is damaged and can't be marked as such: {error.strerror}; remove it"
        ) from None


def list_caches(root: Path) -> list[Cache]:
    """Return the caches in `root`, the one that was used last first; none if there is no such directory.

    Raises:
        UserError: `root` can't be read.
    """
    try:
        names = sorted(os.listdir(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read the token caches in {root}: {error.strerror}") from None
    found = [_describe(root / name) for name in names if _NAME.fullmatch(name) or _UNFINISHED.fullmatch(name)]
    return sorted((cache for cache in found if cache), key=lambda cache: -cache.last_used)


def find_cache(root: Path, name: str) -> Path:
    """Return the directory of the complete or damaged cache whose name begins with `name`, or that `name` is a path of.

    Raises:
        UserError: there is no such cache, or there are several.
    """
    if (Path(name) / INDEX_FILE).is_file():
        return Path(name).absolute()
    matches = [each for each in (root.iterdir() if root.is_dir() else ()) if _NAME.fullmatch(each.name)]
    matches = sorted(each for each in matches if each.name.startswith(name))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"{name}: {len(matches)} caches have names that begin so: {', '.join(m.name for m in matches)}"
        )
    raise UserError(
        f"{name}: there is no token cache of this name in {root}; `megatrain data ls` lists them. "
        "The cache of a config is found by its overrides, such as data.path=my.txt."
    )


def prune(root: Path, *, unused_days: float | None = None, dry_run: bool = False) -> list[Removal]:
    """Remove the caches in `root` that nothing can use any more, and those not used for `unused_days` days.

    Nothing can use what a killed builder left, what another version of the format wrote, what is damaged, and what was
    made from files that have changed since. Caches that a process reads or builds stay. With `dry_run` all stay.
    """
    removals = []
    for cache in list_caches(root):
        reason = _why_not_needed(cache, unused_days)
        if reason is None:
            continue
        failure = "in use" if cache.in_use else None if dry_run else _remove(cache)
        removals.append(Removal(cache, reason, failure))
    if not dry_run:
        _remove_dead_shortcuts(root)
    return removals


def _why_not_needed(cache: Cache, unused_days: float | None) -> str | None:
    if cache.state == "unfinished":
        # The next preparation goes on with it, but not with what earlier versions left, whose names end in a number.
        can_go_on = cache.directory.name == f".partial-{cache.name}" and time.time() - cache.last_used < DAY_S
        return None if cache.in_use or can_go_on else "its builder was ended"
    if cache.state == "other format":
        return "of another version of this program"
    if cache.state == "damaged":
        return "damaged"
    if cache.sources == "changed":
        return "its source files have changed"
    if unused_days is not None and time.time() - cache.last_used >= unused_days * DAY_S:
        return f"not used for {(time.time() - cache.last_used) / DAY_S:.0f} days"
    return None


def _describe(directory: Path) -> Cache | None:
    """Return the entry of a directory; None if it is removed at this moment."""
    unfinished = _UNFINISHED.fullmatch(directory.name)
    index = _read_any_index(directory)
    state: State = "complete"
    if unfinished:
        state = "unfinished"
    elif index.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        state = "other format"
    elif read_index(directory) is None:
        state = "damaged"
    try:
        changed = directory.stat().st_mtime
        if (directory / "work").exists():
            changed = (directory / "work").stat().st_mtime
        sizes = [os.lstat(file).st_size for file in _files(directory)]
    except OSError:
        return None
    with suppress(OSError):
        changed = (directory / INDEX_FILE).stat().st_mtime
    used = changed
    with suppress(OSError):
        used = max(used, (directory / USED_FILE).stat().st_mtime)
    created = changed
    with suppress(ValueError, TypeError, KeyError):
        created = datetime.fromisoformat(index["created"]).timestamp()
    splits = index.get("splits")
    tokens = 0
    with suppress(AttributeError, TypeError, KeyError):
        tokens = sum(split["tokens"] for split in splits.values()) if splits else 0
    return Cache(
        name=unfinished[1] if unfinished else directory.name,
        directory=directory,
        state=state,
        origin=str(index.get("origin", "")),
        tokens=tokens,
        bytes=sum(sizes),
        created=created,
        last_used=used,
        sources=sources_of(directory, created),
        in_use=_is_in_use(directory),
    )


def _files(directory: Path) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        yield from (os.path.join(parent, name) for name in names)


def _read_any_index(directory: Path) -> dict[str, Any]:
    """Return an index of any version; empty if there is none."""
    for name in (INDEX_FILE, DAMAGED_FILE):
        with suppress(OSError, ValueError):
            index = json.loads((directory / name).read_text(encoding="utf-8"))
            if isinstance(index, dict):
                return index
    return {}


# --- sources ---


def sources_of(directory: Path, created: float) -> Sources:
    """Return whether the files that a cache was made from are still what they were.

    A file of the same size is read and hashed only if it was modified after `created`. Files behind URLs are not asked.
    """
    try:
        files = json.loads((directory / SOURCES_FILE).read_text(encoding="utf-8"))
        known = [(Path(f["path"]), f["size"], f["sha256"]) for f in files if not is_url(f["path"])]
    except (OSError, ValueError, TypeError, KeyError):
        return "unknown"
    if not known:
        return "unknown"
    if not any(path.is_file() for path, _, _ in known):
        return "missing"
    return "same" if all(_is_same(*each, created) for each in known) else "changed"


def _is_same(file: Path, size: int, digest: str, created: float) -> bool:
    try:
        status = file.stat()
        if status.st_size != size:
            return False
        if max(status.st_mtime, status.st_ctime) < created:
            return True
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
    except OSError:
        return False


# --- locks and removal ---


def _lock(file: Path, flags: int, kind: int, held: ExitStack) -> None:
    """Lock `file` until `held` is left.

    Raises:
        BlockingIOError: another process has a lock on it.
    """
    descriptor = os.open(file, flags, 0o666)
    held.callback(os.close, descriptor)
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)


def _builder_lock(directory: Path) -> Path:
    """Return the file that a process locks while it builds `directory`, or what will become of it."""
    unfinished = _UNFINISHED.fullmatch(directory.name)
    return directory.parent / f".lock-{unfinished[1] if unfinished else directory.name}"


def _is_in_use(directory: Path) -> bool:
    """Return whether a process builds or reads the cache; False where locks can't be taken."""
    with ExitStack() as held:
        for file, kind in (
            (_builder_lock(directory), fcntl.LOCK_SH),
            (directory / INDEX_FILE, fcntl.LOCK_EX),
        ):
            try:
                _lock(file, os.O_RDONLY, kind, held)
            except BlockingIOError:
                return True
            except OSError:
                continue
    return False


def _remove(cache: Cache) -> str | None:
    """Remove a cache unless a process uses it; return why it was not removed."""
    leftover = cache.directory.with_name(f".partial-{cache.name}-{os.getpid()}-removed")
    try:
        with ExitStack() as held:
            _lock(_builder_lock(cache.directory), os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX, held)
            if (cache.directory / INDEX_FILE).exists():
                _lock(cache.directory / INDEX_FILE, os.O_RDONLY, fcntl.LOCK_EX, held)
            cache.directory.rename(leftover)  # at once: a reader finds all of it or nothing
            shutil.rmtree(leftover)
    except BlockingIOError:
        return "in use"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _remove_dead_shortcuts(root: Path) -> None:
    """Remove what led from a list of files to a cache that is gone."""
    for shortcut in (root / "shortcuts").glob("*"):
        with suppress(OSError, ValueError):
            if not (root / shortcut.read_text(encoding="utf-8").strip()).is_dir():
                shortcut.unlink()
