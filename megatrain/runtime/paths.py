"""Where things are kept between runs."""

import getpass
import os
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.config.paths import expanded


def name_user() -> None:
    """Give a user id that has no name, as in containers, one in USER: PyTorch's compiler and others ask for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def cache_dir() -> Path:
    """Return $MEGATRAIN_CACHE, or ~/.cache/megatrain. It need not exist yet.

    Raises:
        UserError: there is neither the variable nor a home directory.
    """
    chosen = os.environ.get("MEGATRAIN_CACHE")
    if chosen:
        return Path(expanded(chosen))
    try:
        return Path.home() / ".cache" / "megatrain"
    except RuntimeError:  # no HOME, and a user id without a name, as in containers
        raise UserError(
            "There is no home directory for the cache: HOME is not set, and this user has no name. Set MEGATRAIN_CACHE "
            "(or HOME) to a directory that this user may write to."
        ) from None
