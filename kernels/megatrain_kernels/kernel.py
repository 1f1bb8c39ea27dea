"""How an operation is described, and which of its implementations runs.

Each operation has one `Kernel` in its folder's `op.py`. `KERNELS` lists them all; tests and benchmarks iterate over it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from megatrain_kernels.backend import interpreting, triton_runs_on

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Types that Triton kernels read and write; they compute in float32."""


@dataclass(frozen=True)
class Cost:
    """The least work of one call: FLOPs of its matrix products, and bytes that must cross the device's memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        """Add up the work of two calls."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Case:
    """One input of an operation: a name, the tensors' sizes by name, and the call's options."""

    name: str
    sizes: dict[str, int]
    options: dict[str, Any]


def sized(names: str, name: str, sizes: str, **options: Any) -> Case:
    """Return the case `name` whose `names` ("tokens size") have these `sizes` ("4096 768")."""
    return Case(name, dict(zip(names.split(), map(int, sizes.split()), strict=True)), options)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The inputs that an operation is tested, timed and planned with, and what a call costs at least."""

    cases: Sequence[Case]
    """Shapes of published models, timed on a GPU."""
    small: Sequence[Case]
    """Shapes that are multiples of no block size; checked everywhere, and timed where there is no GPU."""
    make_inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    """`make_inputs(case, dtype=..., device=..., seed=0)`: positional arguments and options of the public function."""
    cost: Callable[..., Cost]
    """`cost(case, itemsize=..., backward=False)`."""
    gradients: tuple[int, ...] = ()
    """Positions of the arguments that have a gradient, where they are given."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    """Types in which results are checked."""
    timed_dtype: torch.dtype = torch.bfloat16
    timed_backends: tuple[str, ...] = ("triton",)
    """Backends timed on a GPU; with "auto" where that is not always Triton."""
    ceiling: str = "bf16"
    """Type of the matrix products whose measured rate bounds the operation: bf16, tf32 or fp8."""
    slack: float = 1.0
    """Factor on the tolerance, where rounding errors grow inside by nature."""
    truth: Callable[..., Any] | None = None
    """The exact result for arguments as they are; None: `backend="reference"` on float64 arguments."""


def _supported(*_: Any) -> str | None:
    return None


def _never(*_: Any) -> bool:
    return False


def _plain(*_: Any) -> str:
    return "triton"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An operation, its implementations, and which calls its Triton kernels support."""

    function: Callable[..., Any]
    """The public function: `function(*arguments, backend="auto", **options)`."""
    reference: Callable[..., Any]
    """The definition in plain PyTorch, which `backend="reference"` runs."""
    suite: Suite
    backends: tuple[str, ...] = ("reference", "torch", "triton")
    """Names that `backend` may have beside "auto". Each that begins with "triton" is a module of the operation."""
    unsupported: Callable[..., str | None] = _supported
    """`unsupported(*call)`: what Triton would need but this call does not have; None: Triton supports the call."""
    runs_on: Callable[[Tensor], bool] = triton_runs_on
    """Whether a compiled kernel runs on the device of the call's first tensor."""
    device_needed: str = "a CUDA device"
    """`runs_on` in words."""
    torch_is_faster: Callable[..., bool] = _never
    """`torch_is_faster(*call)`: whether "auto" takes PyTorch's path although Triton supports the call."""
    variant: Callable[..., str] = _plain
    """`variant(*call)`: which of the Triton backends "auto" takes."""
    variant_needs: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    """By Triton backend: as `unsupported`, what it needs beyond that."""
    compiled: Literal["reference", "operator"] = "operator"
    """What "auto" and "torch" take while torch.compile traces. reference: the definition, for an operation bound by
    memory, which the compiler fuses with its neighbours; operator: what they take elsewhere, opaque to the compiler."""

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.function.__name__


KERNELS: dict[str, Kernel] = {}
"""Every operation, by name. `megatrain_kernels/__init__.py` imports them all."""


def register(kernel: Kernel) -> Kernel:
    """Add `kernel` to `KERNELS` and return it."""
    KERNELS[kernel.name] = kernel
    return kernel


class UnsupportedError(ValueError):
    """The caller asked for Triton where its kernels cannot run."""


_preferred = "auto"


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Make `backend="auto"` mean `backend` inside the context, to compare whole models."""
    global _preferred
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


_watched: dict[str, set[str]] | None = None


@contextmanager
def watching() -> Iterator[dict[str, set[str]]]:
    """Collect the paths that calls take inside the context, by operation; those in a traced graph are left out."""
    global _watched
    before, _watched = _watched, {}
    try:
        yield _watched
    finally:
        _watched = before


def select(kernel: Kernel, backend: str, *call: Any) -> str:
    """Return the path that a call takes, and let `watching` know.

    Args:
        backend: "auto" or one of `kernel.backends`.
        call: what `kernel.unsupported` and `kernel.torch_is_faster` judge by, a tensor first.

    Returns:
        "reference", "torch", "triton" or another Triton backend, or its name and "_or_torch": "auto" chose it, and
        PyTorch takes over if its kernels do not compile. While torch.compile traces, see `Kernel.compiled`.

    Raises:
        ValueError: there is no backend of that name.
        UnsupportedError: backend="triton", and the kernels cannot run.
    """
    path = _selected(kernel, _preferred if backend == "auto" else backend, *call)
    if not torch.compiler.is_compiling() and _watched is not None:  # in this order, or a trace depends on it
        _watched.setdefault(kernel.name, set()).add(path.removesuffix("_or_torch"))
    return path


def _selected(kernel: Kernel, backend: str, *call: Any) -> str:
    if kernel.compiled == "reference" and backend in ("auto", "torch") and torch.compiler.is_compiling():
        return "reference"
    if backend == "auto":
        fits = kernel.runs_on(call[0]) and kernel.unsupported(*call) is None
        return f"{kernel.variant(*call)}_or_torch" if fits and not kernel.torch_is_faster(*call) else "torch"
    if backend not in kernel.backends:
        names = ", ".join(("auto", *kernel.backends[:-1]))
        raise ValueError(f"backend={backend!r}: must be {names} or {kernel.backends[-1]} for {kernel.name}")
    if backend.startswith("triton"):
        x: Tensor = call[0]
        if not (kernel.runs_on(x) or (x.device.type == "cpu" and interpreting())):
            raise UnsupportedError(f"backend={backend!r} needs {kernel.device_needed}; got {x.device}")
        reason = kernel.unsupported(*call) or kernel.variant_needs.get(backend, _supported)(*call)
        if reason is not None:
            raise UnsupportedError(f"backend={backend!r} needs {reason}")
    return backend


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the type that autocast asks for on x's device; None: autocast is off."""
    device = x.device.type
    on = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@torch.compiler.assume_constant_result  # torch 2.11's compiler cannot trace the query
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def wrong_dtype(x: Tensor, *known: torch.dtype) -> str | None:
    """Return what `Kernel.unsupported` says of x's type: None if it is one of `known` (default: `KERNEL_DTYPES`)."""
    known = known or KERNEL_DTYPES
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
    return None if x.dtype in known else f"{names}; got {x.dtype}"


_failed: set[tuple[Any, ...]] = set()
"""Kinds of calls whose kernels did not compile here; they take PyTorch's path from then on."""


def run_triton(
    kernel: Kernel, path: str, launch: str, *args: Any, kind: tuple[Any, ...] = (), **options: Any
) -> Any:
    """Return `launch(*args, **options)` of the operation's module for `path`; None: PyTorch's path must do the work.

    Args:
        path: as `select` returns it. On a backend that the caller asked for every error is raised; where "auto" chose
            it, only a lack of memory is, and other errors put the call on PyTorch's path with a warning.
        kind: what kernels are compiled for; calls of a kind that failed once are not tried again.
    """
    if not path.startswith("triton"):
        return None
    variant = path.removesuffix("_or_torch")

    def call() -> Any:
        # Imported by name and late: the module needs triton, which a CPU machine may lack.
        module = import_module(f"{kernel.function.__module__.rpartition('.')[0]}.{variant}")
        return getattr(module, launch)(*args, **options)

    return attempt(kernel.name, "Triton", call, kind=(variant, launch, *kind), strict=path == variant)


def attempt(
    name: str, what: str, call: Callable[[], Any], *, kind: tuple[Any, ...], strict: bool = False
) -> Any:
    """Return what `call` returns, or None where it fails, with a warning; that `kind` of call is not tried again.

    Args:
        name: the operation. what: the implementation that is tried.
        strict: raise every error, as a lack of memory always is.
    """
    key = (name, what, *kind)
    if key in _failed and not strict:
        return None
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if strict:
            raise
        _failed.add(key)
        warnings.warn(f"{name}: {what} failed, PyTorch takes over: {error}", stacklevel=2)
        return None


def require(fits: bool, rule: str, **given: Tensor | None) -> None:
    """Check an operation's arguments by their shapes, types and devices: nothing waits for the device.

    Raises:
        ValueError: not `fits`; the message is the rule and what was given.
    """
    if not fits:
        found = (f"{name} {_described(x)}" for name, x in given.items() if x is not None)
        raise ValueError(f"{rule}; got {', '.join(found)}")


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def require_one_device(**given: Tensor | None) -> None:
    """Check that all tensors are on one device.

    Raises:
        ValueError: they are not.
    """
    tensors = [x for x in given.values() if x is not None]
    if any(x.device != tensors[0].device for x in tensors[1:]):
        require(False, f"{_listed(given)} must be on one device", **given)


def require_floating(**given: Tensor | None) -> None:
    """Check that all tensors have floating types, not necessarily one.

    Raises:
        ValueError: they have not.
    """
    if any(x is not None and not (x.is_floating_point() and x.itemsize > 1) for x in given.values()):
        require(False, f"{_listed(given)} must have floating types of 16 bits or more", **given)


def _listed(given: Mapping[str, Tensor | None]) -> str:
    names = [name for name, x in given.items() if x is not None]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
