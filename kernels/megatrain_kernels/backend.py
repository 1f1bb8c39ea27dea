"""Which implementation of an operation runs."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

Backend = Literal["auto", "torch", "triton", "reference"]


_preferred: Backend = "auto"


@contextmanager
def preferring(backend: Backend) -> Iterator[None]:
    """Within, "auto" means `backend`: for comparisons of whole models."""
    global _preferred
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def preferred(backend: str) -> str:
    """`backend`, or what `preferring` puts in the place of "auto"."""
    return _preferred if backend == "auto" else backend


def choose(backend: str, available: tuple[str, ...] = ("torch", "reference")) -> str:
    """ "auto" is the fastest PyTorch path; "reference" the plain definition; "triton" where an operation has it.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend == "auto":
        return "torch"
    if backend not in available:
        names = ", ".join(("auto", *available[:-1]))
        raise ValueError(f"backend={backend!r}: must be {names} or {available[-1]}")
    return backend


_failed: set[tuple[Any, ...]] = set()
"""Kinds of calls whose kernels did not compile here: they take the PyTorch path from then on."""


@cache
def has_triton() -> bool:
    """Is Triton installed?"""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Does Triton run its kernels on the CPU, in Python (for tests)?"""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and has_triton()


@cache
def _has_tensor_cores(index: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


@torch.compiler.assume_constant_result  # the questions cannot be traced
def _compiles_for(index: int) -> bool:
    return has_triton() and _has_tensor_cores(index)


def triton_runs_on(x: Tensor) -> bool:
    """Can a compiled kernel take x? (Triton's interpreter takes CPU tensors too: only tests ask for that.)"""
    return x.is_cuda and _compiles_for(x.device.index or 0)


KNOWN = (torch.float16, torch.bfloat16, torch.float32)
"""Types that kernels compute with, in float32 inside."""


def wants_triton(x: Tensor, backend: str, *, fits: bool = True) -> bool:
    """Is an elementwise or row-wise operation on x to run its kernels? `fits`: x has a size that they take.

    Raises:
        ValueError: backend="triton", and they cannot.
    """
    backend = preferred(backend)
    if backend not in ("auto", "triton"):
        return False
    able = x.dtype in KNOWN and fits
    if backend == "auto":
        return able and triton_runs_on(x)
    here = triton_runs_on(x) or (x.device.type == "cpu" and interpreting())
    if not (able and here):
        raise ValueError(
            "backend='triton' needs a CUDA device, float16, bfloat16 or float32, and rows that registers hold; "
            f"got {x.device.type}, {x.dtype}, {tuple(x.shape)}"
        )
    return True


def try_triton(kind: tuple[Any, ...], launch: Callable[[], Result], *, backend: str) -> Result | None:
    """What `launch` returns, or None where kernels of this `kind` (operation first) fail: PyTorch takes over.

    With backend="triton", which somebody asked for, and for want of memory, the error is raised.
    """
    if backend != "triton" and kind in _failed:
        return None
    try:
        return launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if backend == "triton":
            raise
        _failed.add(kind)
        warnings.warn(f"{kind[0]}: Triton failed, PyTorch takes over: {error}", stacklevel=2)
        return None
