"""Which implementation of an operation runs."""

from typing import Literal

Backend = Literal["auto", "torch", "reference"]


def choose(backend: str) -> str:
    """ "auto" is the fastest PyTorch path; "reference" the plain definition.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend == "auto":
        return "torch"
    if backend not in ("torch", "reference"):
        raise ValueError(f"backend={backend!r}: must be auto, torch or reference")
    return backend
