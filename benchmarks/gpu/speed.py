"""Speed of every operation beside public implementations, forward alone and forward with backward.

Rows hold what was measured and what the work is; shares of the floor and ratios are computed in `report.py`. The
backward pass is what both take beyond the forward pass: some operations make their gradients in the forward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Arguments, Options, Peer, peers_of
from benchmarks.gpu.steps import Row, Setting, Step
from megatrain_kernels.kernel import KERNELS, Case, Cost, Kernel, UnsupportedError


class Inputs:
    """Inputs of the latest case, which several steps share: the largest take gigabytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: tuple[str, str] | None = None
        self._made: tuple[Arguments, Options] = ((), {})

    def of(self, kernel: Kernel, case: Case) -> tuple[Arguments, Options]:
        """Return the arguments and options of a case."""
        if self._key != (kernel.name, case.name):
            self._key, self._made = None, ((), {})  # frees the last one's memory first
            suite = kernel.suite
            self._made = suite.make_inputs(case, dtype=suite.timed_dtype, device=str(self._device))
            self._key = (kernel.name, case.name)
        return self._made


def steps(setting: Setting) -> list[Step]:
    """List one step for each operation, case and implementation; those that torch.compile makes come last."""
    inputs = Inputs(setting.device)
    on_gpu = setting.device.type == "cuda"
    found: list[Step] = []
    for compiled in (False, True) if on_gpu else (False,):
        for kernel, case in _in_turn(setting.small):
            about = {
                "operation": kernel.name,
                "case": case.name,
                "dtype": str(kernel.suite.timed_dtype).removeprefix("torch."),
            }
            if not compiled:
                for backend in kernel.suite.timed_backends if on_gpu else ("auto",):
                    who = {**about, "implementation": f"megatrain {backend}"}
                    found.append(Step(who, partial(_ours, setting, inputs, kernel, case, backend, who)))
            for name, peer in peers_of(kernel).items():
                if peer.compiled == compiled:
                    who = {**about, "implementation": name}
                    found.append(Step(who, partial(_theirs, setting, inputs, kernel, case, peer, who)))
    return found


def _in_turn(small: bool) -> Iterator[tuple[Kernel, Case]]:
    """Yield the first case of each operation, then each one's second: if time is short, each has had a turn."""
    cases = {name: kernel.suite.small if small else kernel.suite.cases for name, kernel in KERNELS.items()}
    for turn in range(max(map(len, cases.values()))):
        for name, kernel in KERNELS.items():
            if turn < len(cases[name]):
                yield kernel, cases[name][turn]


def _ours(
    setting: Setting, inputs: Inputs, kernel: Kernel, case: Case, backend: str, about: Row
) -> list[Row]:
    given, options = inputs.of(kernel, case)
    run = partial(kernel.function, backend=backend, **options)
    try:
        return _rows(setting, kernel, case, run, given, about)
    except UnsupportedError:
        return []  # there is no kernel for this input: no failure


def _theirs(
    setting: Setting, inputs: Inputs, kernel: Kernel, case: Case, peer: Peer, about: Row
) -> list[Row]:
    given, options = inputs.of(kernel, case)
    torch._dynamo.reset()  # else the number of shapes that it has compiled counts against the next
    run = peer.make(given, options)
    return [] if run is None else _rows(setting, kernel, case, run, given, about)


def _rows(
    setting: Setting, kernel: Kernel, case: Case, run: Callable[..., Any], given: Arguments, about: Row
) -> list[Row]:
    """Return a row for the forward pass without gradients, and one for both passes."""
    suite = kernel.suite
    cost = partial(suite.cost, case, itemsize=suite.timed_dtype.itemsize)
    with torch.no_grad():
        ms = setting.clock.median_ms(lambda: run(*given))
    rows = [_row(about, "forward", ms, cost(), suite.ceiling)]
    places = [n for n in suite.gradients if n < len(given) and given[n] is not None]
    if not places:
        return rows
    inputs = [
        t.detach().requires_grad_(n in places) if isinstance(t, Tensor) else t for n, t in enumerate(given)
    ]
    wanted = [inputs[n] for n in places]
    cotangents: list[Tensor] = []

    def both() -> None:
        made = run(*inputs)
        outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.dtype != torch.int64]
        if not cotangents:
            cotangents.extend(torch.randn_like(t) for t in outputs)
        torch.autograd.grad(outputs, wanted, cotangents)

    ms = setting.clock.median_ms(both)
    whole = cost() + cost(backward=True)
    row = _row(about, "both", ms, whole, suite.ceiling)
    return [*rows, {**row, "peak_bytes": _peak(setting.device, both)}]


def _row(about: Row, passes: str, ms: float, cost: Cost, ceiling: str) -> Row:
    figures = {"ms": ms, "flops": cost.flops, "bytes": cost.bytes, "ceiling": ceiling}
    return {**about, "passes": passes, **figures}


def _peak(device: torch.device, run: Callable[[], None]) -> int | None:
    """Measure the bytes that `run` holds at most beyond what is there before it; None: no GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return int(torch.cuda.max_memory_allocated(device) - before)
