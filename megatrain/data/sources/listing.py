"""The files of a corpus: what `data.path` names, on this machine or behind a URL, without reading it."""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatrain.config.errors import UserError
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.remote import list_url, open_url
from megatrain.runtime.urls import is_url

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
TEXT_HINT = (
    "Name text files, JSON, CSV, Parquet or Arrow files (each also compressed), archives of them, a directory, or a "
    "glob pattern; see docs/data.md."
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the corpus. `name` is its path relative to the corpus, `size` is in bytes.

    `stamp` changes when the content does: times in nanoseconds, or what a remote file system says of it.
    """

    path: str
    name: str
    size: int
    stamp: tuple[int | str, ...]

    def open(self) -> BinaryIO:
        """Open the file for reading bytes.

        Raises:
            UserError: it can't be read.
        """
        if is_url(self.path):
            return open_url(self.path)
        with accessible(self.path):
            return open(self.path, "rb")

    def times(self) -> tuple[int, ...]:
        """Return the local times in nanoseconds; none for a remote file."""
        return tuple(each for each in self.stamp if isinstance(each, int))


def list_path(path: str, left_out: LeftOut) -> tuple[list[SourceFile], bool]:
    """Return the files of one `path`, sorted by name, and whether it names a single file.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    if is_url(path):
        found = [SourceFile(*each) for each in list_url(path, left_out)]
        return found, len(found) == 1 and found[0].path == path
    root = os.path.abspath(path)
    if _exists(root):
        if os.path.isfile(root):
            return list(_expand(root, Path(root).name, left_out)), True
        return list(_expand(root, "", left_out)), False
    if glob.has_magic(root):
        matches = sorted(glob.glob(root, recursive=True))
        if not matches:
            raise UserError(f"data.path={path}: no file matches this pattern ({root})")
        found = [f for match in matches for f in _expand(match, os.path.relpath(match), left_out)]
        return list({f.path: f for f in found}.values()), False  # `**` matches a folder and what is in it
    raise UserError(f"data.path={path}: there is no such file or directory ({root})")


def list_stdlib() -> list[SourceFile]:
    """Return the Python source of the standard library, without lib2to3's fixtures in the grammar of Python 2.

    Raises:
        UserError: there is none on this machine.
    """
    root = sysconfig.get_paths()["stdlib"]
    files = [
        f
        for f in _walk(root, "", LeftOut(), set())
        if f.name.endswith(".py") and not f.name.startswith("lib2to3/tests/data/")
    ]
    if not files:
        raise UserError(f"no source code of the Python standard library was found in {root}; set data.path")
    return files


@contextmanager
def accessible(path: str) -> Iterator[None]:
    """Turn an OSError about `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _exists(path: str) -> bool:
    """Return whether `path` exists; unlike `os.path.exists`, raise if a directory above it may not be entered."""
    with accessible(path):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(path):
                raise UserError(
                    f"cannot read {path}: it is a link to {os.readlink(path)}, which doesn't exist"
                ) from None
            return False
    return True


def _expand(path: str, name: str, left_out: LeftOut) -> Iterator[SourceFile]:
    """Yield the file `path` under the name `name`, or the files of the directory `path`."""
    with accessible(path):
        if os.path.isdir(path):
            yield from _walk(path, f"{name}/" if name else "", left_out, set())
            return
        if not os.path.exists(path):  # matched by a pattern
            left_out.add_file(name, "broken link", 0)
            return
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is neither a file nor a directory. {TEXT_HINT}")
    yield _source_file(path, name, status)


def _walk(root: str, prefix: str, left_out: LeftOut, above: set[tuple[int, int]]) -> Iterator[SourceFile]:
    """Yield all files below `root`, sorted by name; links to folders are followed, but not into a folder `above`."""
    with accessible(root):
        status = os.stat(root)
        inside = above | {(status.st_dev, status.st_ino)}
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda e: e.name)
    for entry in found:
        name = prefix + entry.name
        if entry.name.startswith("."):
            left_out.add_file(name, "hidden", _size(entry))
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out.add_file(name, "broken link", 0)
        elif entry.is_dir():
            status = os.stat(entry.path)
            if entry.name in SKIPPED_FOLDERS:
                left_out.add_file(name, "installed packages" if "packages" in entry.name else "bytecode", 0)
            elif (status.st_dev, status.st_ino) in inside:
                left_out.add_file(name, "link to a folder above it", 0)
            else:
                yield from _walk(entry.path, f"{name}/", left_out, inside)
        elif entry.is_file():
            yield _source_file(entry.path, name, entry.stat())
        else:
            left_out.add_file(name, "neither file nor folder", 0)


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except OSError:
        return 0


def _source_file(path: str, name: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, name, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))
