"""A new file that appears at once."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatrain.config.errors import UserError


def require_new_file(target: Path) -> None:
    """Refuse a path where something is.

    Raises:
        UserError: it exists.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already. Remove it, or write another file.")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which becomes `target` if all goes well, and is removed otherwise.

    Raises:
        UserError: it can't be written.
    """
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.rename(partial, target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
