"""The packages of the extra `data`, which only some steps need."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from megatrain.config.errors import UserError
from megatrain.runtime.packages import how_to_install

PACKAGES = {
    "fix_text": ("ftfy",),
    "html": ("trafilatura", "lxml", "lxml_html_clean"),
    "language": ("py3langid",),
    "near_duplicates": ("rensa",),
}
"""Step -> the distributions that decide what it does; the first one is what it imports."""


@contextmanager
def library(package: str, step: str) -> Iterator[None]:
    """Turn the failure of an import into a message that says how to install what the step needs.

    Raises:
        UserError: the import failed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(_missing(step, f"the package {package} ({error})")) from None


def versions(step: str) -> dict[str, str]:
    """Return the version of each package that `step` uses.

    Raises:
        UserError: one is not installed.
    """
    found = {}
    for package in PACKAGES.get(step, ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise UserError(_missing(step, f"the package {package}")) from None
    return found


def _missing(step: str, what: str) -> str:
    return f"data.clean's step {step} needs {what}. Install it: {how_to_install(' '.join(PACKAGES[step]))}"
