"""Files behind a URL, through fsspec: object stores, the Hugging Face hub, web servers."""

from typing import BinaryIO, cast

from megatrain.config.errors import UserError
from megatrain.data.sources.left_out import LeftOut
from megatrain.runtime.urls import open_file_system, reachable

Listed = tuple[str, str, int, tuple[int | str, ...]]
"""Path, name, size in bytes and stamp of a file."""


def list_url(url: str, left_out: LeftOut) -> list[Listed]:
    """Return the files of a URL: of a file, of all that is below a folder, or that match a pattern.

    Raises:
        UserError: the protocol is unknown or its package missing, or the place can't be reached or holds no file.
    """
    file_system, path = open_file_system(url)
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
    file_system, path = open_file_system(url)
    with reachable(url):
        return cast(BinaryIO, file_system.open(path, "rb"))
