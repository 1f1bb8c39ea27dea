"""Files behind a URL, through fsspec: object stores, the Hugging Face hub, web servers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from megatrain.config.errors import UserError
from megatrain.data.sources.left_out import LeftOut
from megatrain.runtime.packages import how_to_install

Listed = tuple[str, str, int, tuple[int | str, ...]]
"""Path, name, size in bytes and stamp of a file."""


def is_url(path: str) -> bool:
    """Return whether `path` names a protocol, such as `s3://` or `hf://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def list_url(url: str, left_out: LeftOut) -> list[Listed]:
    """Return the files of a URL: of a file, of all that is below a folder, or that match a pattern.

    Raises:
        UserError: the protocol is unknown or its package missing, or the place can't be reached or holds no file.
    """
    file_system, path = _file_system(url)
    with reachable(url):
        if any(sign in path for sign in "*?["):
            found = file_system.glob(path, detail=True)
        elif file_system.isfile(path):
            found = {path: file_system.info(path)}
        else:
            found = file_system.find(path, detail=True)
    files = {name: info for name, info in found.items() if info.get("type") == "file"}
    if not files:
        raise UserError(f"data.path={url}: there is no file at this address")
    listed: list[Listed] = []
    for name in sorted(files):
        inner = name.removeprefix(path).lstrip("/") or name.rpartition("/")[2]
        if any(part.startswith(".") for part in inner.split("/")):
            left_out.add_file(inner, "hidden", int(files[name].get("size") or 0))
            continue
        with reachable(url):
            stamp = (str(file_system.ukey(name)),)
        listed.append((file_system.unstrip_protocol(name), inner, int(files[name].get("size") or 0), stamp))
    return listed


def open_url(url: str) -> BinaryIO:
    """Open the file at `url` for reading bytes.

    Raises:
        UserError: it can't be reached.
    """
    file_system, path = _file_system(url)
    with reachable(url):
        return cast(BinaryIO, file_system.open(path, "rb"))


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: reading from a URL needs fsspec: {how_to_install('fsspec')}") from None
    protocol = url.partition("://")[0]
    try:
        with reachable(url):
            return cast(tuple[Any, str], url_to_fs(url))
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(protocol)
        package = package or {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}.get(
            protocol, ""
        )
        how = f": {how_to_install(package)}" if package else f" ({error})"
        raise UserError(
            f"{url}: reading from {protocol}:// needs a package that is not installed{how}"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turn the failure of a remote file system into a UserError."""
    try:
        yield
    except (UserError, ImportError, ValueError):
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file") from None
    except Exception as error:  # every backend has errors of its own
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{url} can't be read: {said}. Is the address right, and can this machine reach it?"
        ) from None
