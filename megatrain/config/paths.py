"""Paths as users write them."""

import os
from typing import Annotated

from megatrain.config.errors import UserError


class PathMark:
    """Mark of a text field that is a path: the loader expands `~` in it."""


PathText = Annotated[str, PathMark()]


def expanded(path: str) -> str:
    """Return `path` with a leading `~` or `~user` replaced by that home directory.

    Raises:
        UserError: there is no such user, or no home directory.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        name = found.partition("/")[0]
        why = "HOME is not set" if name == "~" else "there is no such user"
        raise UserError(
            f"{path}: {why}, so {name} means nothing; write the full path, or ./{path} for that name"
        )
    return found
