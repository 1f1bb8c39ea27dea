"""Speed of every operation beside public implementations, forward alone and forward with backward.

Rows hold what was measured and what the work is; shares of the floor and ratios are computed in `report.py`. The
backward pass is what both take beyond the forward pass: some operations make their gradients in the forward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.aims import LONG
from benchmarks.gpu.peers import Arguments, Options, Peer, peers_of
from benchmarks.gpu.steps import Row, Setting, Step
from megatrain.observe.profile import OF_PROFILER
from megatrain_kernels.kernel import KERNELS, Case, Cost, Kernel, Suite, UnsupportedError


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
    return [step for step, important in _listed(setting) if not important]


def important_steps(setting: Setting) -> list[Step]:
    """List the steps of causal attention over 16k tokens with heads of 128, which `steps` leaves out."""
    return [
        Step({"part": "speed", **step.about}, step.run) for step, important in _listed(setting) if important
    ]


def _listed(setting: Setting) -> Iterator[tuple[Step, bool]]:
    """Yield the steps, and whether they are of the most important case."""
    inputs = Inputs(setting.device)
    on_gpu = setting.device.type == "cuda"
    for compiled in (False, True) if on_gpu else (False,):
        for kernel, case in in_turn(setting.small):
            important = case is most_important(setting.small)
            about = {
                "operation": kernel.name,
                "case": case.name,
                "dtype": str(kernel.suite.timed_dtype).removeprefix("torch."),
            }
            if not compiled:
                for backend in kernel.suite.timed_backends if on_gpu else ("auto",):
                    who = {**about, "implementation": f"megatrain {backend}"}
                    run = partial(_ours, setting, inputs, kernel, case, backend, who)
                    yield Step(who, run), important
            for name, peer in peers_of(kernel).items():
                if peer.compiled == compiled:
                    who = {**about, "implementation": name}
                    run = partial(_theirs, setting, inputs, kernel, case, peer, who)
                    yield Step(who, run), important


def most_important(small: bool) -> Case:
    """Return the case that is timed before all others."""
    suite = KERNELS["attention"].suite
    return suite.small[0] if small else next(case for case in suite.cases if case.name == LONG)


def in_turn(small: bool) -> Iterator[tuple[Kernel, Case]]:
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
        rows = _rows(setting, kernel, case, run, given, about)
        if backend == "auto":
            both = passes(kernel.suite, run, given)
            rows = [{**row, "took": slowest_kernel(both[row["passes"]], setting.device)} for row in rows]
        return rows
    except UnsupportedError:
        return []  # there is no kernel for this input: no failure


def _theirs(
    setting: Setting, inputs: Inputs, kernel: Kernel, case: Case, peer: Peer, about: Row
) -> list[Row]:
    given, options = inputs.of(kernel, case)
    torch._dynamo.reset()  # else the number of shapes that it has compiled counts against the next
    run = peer.make(given, options)
    if run is None:
        return []
    rows = _rows(setting, kernel, case, run, peer.given(given), about)
    return rows if peer.same_work else [{**row, "same_work": False} for row in rows]


def passes(suite: Suite, run: Callable[..., Any], given: Arguments) -> dict[str, Callable[[], None]]:
    """Return `run` without gradients as "forward" and, where there are gradients, with them as "both"."""

    def forward() -> None:
        with torch.no_grad():
            run(*given)

    places = [n for n in suite.gradients if n < len(given) and given[n] is not None]
    if not places:
        return {"forward": forward}
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

    return {"forward": forward, "both": both}


def slowest_kernel(run: Callable[[], None], device: torch.device) -> str | None:
    """Return the name of what takes most of the device's time in `run`: a kernel's, and on a CPU an operator's."""
    on_gpu = device.type == "cuda"
    run()  # what is made once is not of the call
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    totals: dict[str, float] = {}
    for event in recorded.events() or ():
        if (event.device_type == DeviceType.CUDA) == on_gpu and event.name not in OF_PROFILER:
            time = event.device_time_total if on_gpu else event.self_cpu_time_total
            totals[event.name] = totals.get(event.name, 0.0) + time
    return max(totals, key=totals.__getitem__, default=None)


def _rows(
    setting: Setting, kernel: Kernel, case: Case, run: Callable[..., Any], given: Arguments, about: Row
) -> list[Row]:
    """Return a row for the forward pass without gradients, and one for both passes."""
    suite = kernel.suite
    cost = partial(suite.cost, case, itemsize=suite.timed_dtype.itemsize)
    calls = passes(suite, run, given)
    rows = [_row(about, "forward", setting.clock.median_ms(calls["forward"]), cost(), suite.ceiling)]
    if "both" not in calls:
        return rows
    ms = setting.clock.median_ms(calls["both"])
    row = _row(about, "both", ms, cost() + cost(backward=True), suite.ceiling)
    return [*rows, {**row, "peak_bytes": _peak(setting.device, calls["both"])}]


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
