"""Which candidate of a kernel's tuning runs, where Triton would time them all and keep the fastest.

Timing while other processes use the GPU would keep a wrong one. So what runs in the pool compiles all candidates
without timing any, or runs a given one: correctness is checked of each, not only of the one that is fastest here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from megatrain_kernels.backend import has_triton


@dataclass
class Seen:
    """What was found while kernels ran."""

    candidates: int = 1
    """The most candidates of one kernel."""


@contextmanager
def candidate(number: int) -> Iterator[Seen]:
    """Make each tuned kernel run its candidate `number`, counted around, or the next one that fits the device."""
    seen = Seen()

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        configs = _candidates(tuner, args, kwargs)
        seen.candidates = max(seen.candidates, len(configs))
        first = number % len(configs)
        return _first_that_fits(tuner, configs[first:] + configs[:first], args, kwargs)

    with _running(run):
        yield seen


@contextmanager
def compiling(part: int = 0, parts: int = 1) -> Iterator[None]:
    """Make each tuned kernel compile every `parts`-th candidate from `part` on, and run the first of them that fits."""

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        configs = _candidates(tuner, args, kwargs)
        mine = configs[part::parts] or configs[:1]
        named = {name: value for name, value in kwargs.items() if name != "warmup"}
        for config in mine:
            with suppress(*_does_not_fit()):
                tuner.fn.warmup(*args, **named, **config.all_kwargs())
        return _first_that_fits(tuner, mine + configs, args, kwargs)

    with _running(run):
        yield


def _candidates(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    return list(tuner.prune_configs(kwargs))


def _first_that_fits(tuner: Any, configs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for number, config in enumerate(configs):
        try:
            return tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        except _does_not_fit():
            if number == len(configs) - 1:
                raise
    return None


def _does_not_fit() -> tuple[type[Exception], ...]:
    """Return the errors of a candidate that this device cannot run; tuning leaves it out as well."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompileTimeAssertionFailure


@contextmanager
def _running(run: Callable[..., Any]) -> Iterator[None]:
    """Put `run` in place of what tuned kernels do when they are called."""
    if not has_triton():
        yield
        return
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.run
    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = before
