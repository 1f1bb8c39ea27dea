"""How to get a package that a feature lacks."""

import shlex
import sys
from importlib.util import find_spec

from megatrain.config.errors import UserError


def how_to_install(package: str) -> str:
    """Return the command that installs `package` where this process would find it."""
    return f"{shlex.quote(sys.executable)} -m pip install {package}"


def require_package(package: str, feature: str) -> None:
    """Refuse a feature whose package is missing.

    Raises:
        UserError: `package` can't be imported; says how to get it.
    """
    if find_spec(package) is None:
        raise UserError(f"{feature} needs the package {package}. Install it: {how_to_install(package)}")
