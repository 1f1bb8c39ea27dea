"""Places behind a URL, through fsspec: object stores, the Hugging Face hub, web servers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from megatrain.config.errors import UserError
from megatrain.runtime.packages import how_to_install

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""Package that a protocol needs besides fsspec."""


def is_url(path: str) -> bool:
    """Return whether `path` names a protocol, such as `s3://` or `hf://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def open_file_system(url: str, **options: object) -> tuple[Any, str]:
    """Return the fsspec file system of `url`, and the path of `url` in it.

    Args:
        options: of the file system; one that does not know them ignores them.

    Raises:
        UserError: fsspec or the protocol's package is missing, or the protocol is unknown.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: a URL needs fsspec: {how_to_install('fsspec')}") from None
    protocol = url.partition("://")[0]
    try:
        with reachable(url):
            return cast(tuple[Any, str], url_to_fs(url, **options))
    except ImportError as error:
        package = PACKAGES.get(protocol)
        how = f": {how_to_install(package)}" if package else f" ({error})"
        raise UserError(f"{url}: {protocol}:// needs a package that is not installed{how}") from None
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
            f"{url} can't be reached: {said}. Is the address right, and can this machine reach it?"
        ) from None
